import pytest
import torch

from fewer.methods.vlm.ts_llava import TSLLaVA, spaced
from fewer.types import FewerError
from tests.methods.vlm.build import lay, place
from tests.methods.vlm.waves import decide, kept, through, video, waves


def test_two_pooled_frames_and_two_samples() -> None:
    # three frames of four tokens; the first and the last are pooled to one token each, which stands at its first place
    x = torch.arange(12.0).view(12, 1)
    plan = decide(TSLLaVA(frames=2, thumbnail=0.5), place(12, features=x, layout=video(3, 2, 2)), 4)
    assert plan.survivors[0].tolist() == [0, 1, 8, 11]
    assert plan.apply(x.unsqueeze(0))[0].flatten().tolist() == [1.5, 1, 9.5, 11]


def test_as_the_authors_space() -> None:
    # uniformly_sample_frames and sample_tokens of tingyu215/TS-LLaVA: rounded places of a linspace with both ends
    assert spaced(50, 6).tolist() == [0, 10, 20, 29, 39, 49]
    assert spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert spaced(9, 9).tolist() == list(range(9))
    assert spaced(9, 1).tolist() == [0]
    assert len(set(spaced(1000, 999).tolist())) == 999


def test_as_in_plain_python() -> None:
    x = waves(30, 1)
    plan = decide(TSLLaVA(frames=3, thumbnail=0.3), place(30, features=x, layout=video(5, 2, 3)), 10)
    middle = [0, 12, 24]  # the first of the tokens that are nearest to the middle of two rows of three
    out = plan.apply(x.unsqueeze(0))[0].flatten()
    thumbs = [int((plan.survivors[0] == at + 1).nonzero()) for at in middle]
    assert out[thumbs].tolist() == pytest.approx([float(x[at : at + 6].mean()) for at in middle], abs=1e-6)
    rest = [i for i in range(30) if i - 1 not in middle]
    sampled = [rest[i] for i in (0, 4, 9, 13, 17, 22, 26)]
    assert sorted([*sampled, *(at + 1 for at in middle)]) == plan.survivors[0].tolist()


@pytest.mark.parametrize("thumbnail", [0.0, 1 / 6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 35])
def test_exact_counts(thumbnail: float, count: int) -> None:
    assert len(kept(TSLLaVA(thumbnail=thumbnail), place(36, layout=video(4, 3, 3)), count)) == count
    assert len(kept(TSLLaVA(frames=2, thumbnail=thumbnail), place(36, layout=video(4, 3, 3)), count)) == count


def test_a_picture_is_one_frame() -> None:
    x = torch.arange(16.0).view(16, 1)
    plan = decide(TSLLaVA(thumbnail=1.0), place(16, features=x, grid=(4, 4)), 4)
    assert plan.apply(x.unsqueeze(0))[0].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert len(kept(TSLLaVA(), place(13, layout=lay([(3, 3), (2, 2)])), 6)) == 6


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="frames=0"):
        TSLLaVA(frames=0)
    with pytest.raises(FewerError, match=r"thumbnail=1\.5"):
        TSLLaVA(thumbnail=1.5)


def test_in_a_model() -> None:
    through("ts-llava", "llava")
    through("ts-llava", "qwen3_vl", frames=8)
