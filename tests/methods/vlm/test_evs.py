import pytest
import torch

from fewer.methods.vlm.evs import EVS
from fewer.score.frames import elsewhen, number
from fewer.signals.visual import Layout
from fewer.types import FewerError
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import drifting, kept, through, video


def test_what_changes_stays() -> None:
    # two places, three frames: the first place turns by a right angle in the last frame, the second one half as much
    x = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [1, 1]])
    tokens = place(6, features=x, layout=video(3, 1, 2))
    assert EVS().score(tokens)[0].tolist() == pytest.approx([255, 255, 0, 0, 1, 1 - 0.5**0.5], abs=1e-6)
    assert kept(EVS(), tokens, 3) == [0, 1, 4]
    assert kept(EVS(), tokens, 4) == [0, 1, 4, 5]
    assert kept(EVS(), tokens, 5) == [0, 1, 2, 4, 5]  # of equals the earlier one


@pytest.mark.parametrize(
    "expected",
    [[0, 1, 2, 3, 4, 5, 6, 7, 8, 27, 28, 29, 30, 31, 32, 33, 34, 35], [0, 1, 2, 3, 4, 5, 6, 7, 8]],
)
def test_as_the_authors(expected: list[int]) -> None:
    # from compute_retention_mask of vllm/multimodal/evs.py on the same numbers, q = 0.5 and 0.9
    assert kept(EVS(), place(36, features=drifting(), layout=video(4, 3, 3)), len(expected)) == expected


def test_as_in_plain_python() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(5))
    value = [255.0] * 10
    for i in range(10, 40):
        value.append(1 - float(x[i] @ x[i - 10] / x[i].norm() / x[i - 10].norm()))
    best = sorted(sorted(range(40), key=lambda i: -value[i])[:23])
    assert kept(EVS(), place(40, features=x, layout=video(4, 2, 5)), 23) == best


def test_less_than_a_frame() -> None:
    tokens = place(36, features=drifting(), layout=video(4, 3, 3))
    assert kept(EVS(), tokens, 3) == [0, 3, 6]
    assert kept(EVS(), tokens, 1) == [0]
    assert len(kept(EVS(), tokens, 35)) == 35


def test_a_place_that_is_gone_counts_as_new() -> None:
    layout = video(3, 1, 2).take(torch.tensor([0, 1, 3, 4, 5]))
    assert number(layout, "it").tolist() == [0, 0, 1, 2, 2]
    assert elsewhen(layout, (layout.crop - 1).clamp(min=0)).tolist() == [0, 1, 1, -1, 2]
    scores = EVS().score(place(5, features=torch.ones(5, 3), layout=layout))
    assert scores[0].tolist() == pytest.approx([255, 255, 0, 255, 0], abs=1e-6)


def test_two_videos() -> None:
    layout = Layout.join([video(2, 1, 2), video(2, 1, 2)])
    scores = EVS().score(place(8, features=torch.ones(8, 3), layout=layout))
    assert scores[0].tolist() == pytest.approx([255, 255, 0, 0, 255, 255, 0, 0], abs=1e-6)


def test_pictures_are_refused() -> None:
    with pytest.raises(FewerError, match="EVS compares the frames of a video"):
        kept(EVS(), place(9, grid=(3, 3)), 4)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_in_a_model(family: str) -> None:
    through("evs", family, frames=4)
