import pytest
import torch

from fewer.methods.vlm.dycoke import DyCoke
from fewer.signals.aside import Dynamic
from fewer.types import FewerError
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import decide, kept, through, video, waves


def test_what_repeats_the_frame_before_leaves() -> None:
    # four frames of two places: at the first place nothing ever moves, at the second everything
    x = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [1, 0], [-1, 0], [1, 0], [0, 1]])
    tokens = place(8, features=x, layout=video(4, 1, 2))
    # frame 2 with 1, frame 3 with 1, frame 4 with 3
    assert DyCoke().score(tokens)[0].tolist() == pytest.approx([3, 3, 0, 1, 0, 1, 0, 1], abs=1e-6)
    assert kept(DyCoke(), tokens, 5) == [0, 1, 3, 5, 7]


def naive(x: torch.Tensor, frames: int, size: int, left: list[int]) -> list[int]:
    """What stays, if so many of each frame do."""

    def cosine(i: int, j: int) -> float:
        return float(x[i] @ x[j] / x[i].norm() / x[j].norm())

    found = []
    for frame in range(frames):
        index = range(frame * size, (frame + 1) * size)
        back = {0: 0, 1: 1, 2: 2, 3: 1}[frame % 4]
        likeness = {i: cosine(i, i - back * size) for i in index}
        found += sorted(index, key=lambda i: (likeness[i], -i))[: left[frame]]
    return sorted(found)


def test_as_in_plain_python() -> None:
    x = torch.randn(54, 5, generator=torch.Generator().manual_seed(9))
    tokens = place(54, features=x, layout=video(6, 3, 3))
    assert kept(DyCoke(), tokens, 18 + 13) == naive(x, 6, 9, [9, 4, 3, 3, 9, 3])


AUTHORS = {
    8: [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 22, 23, 24, 33, 35, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 55,
        57, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, 71, 73, 74,
    ],
    9: [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 22, 23, 24, 33, 35, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 55,
        57, 59, 60, 62, 68, 71, 73, 74,
    ],
    10: [
        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 22, 23, 24, 33, 35, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 55,
        57, 59, 60, 62, 68, 71, 73, 74, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 93, 96, 98,
    ],
}  # fmt: skip


@pytest.mark.parametrize("frames", [8, 9, 10])
def test_as_the_authors(frames: int) -> None:
    # the set that dycole_ttm (llava/model/llava_arch.py of KD-TAO/DyCoke) leaves at ten tokens a frame and k = 0.7
    tokens = place(frames * 10, features=waves(frames * 10, 8), layout=video(frames, 2, 5))
    assert kept(DyCoke(official=True), tokens, len(AUTHORS[frames])) == AUTHORS[frames]


def test_the_last_group_is_as_the_others() -> None:
    tokens = place(80, features=waves(80, 8), layout=video(8, 2, 5))
    counts = torch.bincount(torch.tensor(kept(DyCoke(), tokens, 38)) // 10)
    assert counts.tolist() == [10, 3, 3, 3, 10, 3, 3, 3]


def test_larger_groups() -> None:
    tokens = place(80, features=waves(80, 8), layout=video(8, 2, 5))
    counts = torch.bincount(torch.tensor(kept(DyCoke(group=8), tokens, 17)) // 10)
    assert counts.tolist() == [10, 1, 1, 1, 1, 1, 1, 1]
    assert torch.bincount(torch.tensor(kept(DyCoke(group=2), tokens, 44)) // 10)[:2].tolist() == [10, 1]


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 9])
def test_exact_counts(official: bool, frames: int) -> None:
    tokens = place(frames * 4, features=torch.ones(frames * 4, 3), layout=video(frames, 2, 2))
    for count in range(1, frames * 4):
        assert len(kept(DyCoke(official=official), tokens, count)) == count


def test_groups_grow_where_few_are_to_stay() -> None:
    tokens = place(80, features=waves(80, 8), layout=video(8, 2, 5))
    for count in (10, 17, 19):
        plan = decide(DyCoke(), tokens, count)
        assert plan.survivors[0].tolist() == kept(DyCoke(group=8), tokens, count)
        assert plan.note == "DyCoke compares groups of 8 frames, not 4, to keep so few"
    assert decide(DyCoke(), tokens, 20).note == ""
    assert kept(DyCoke(), tokens, 5) == [0, 2, 4, 6, 8]


def test_refusals() -> None:
    with pytest.raises(FewerError, match="DyCoke compares the frames"):
        kept(DyCoke(), place(9, grid=(3, 3)), 4)
    with pytest.raises(FewerError, match="group=6"):
        DyCoke(group=6)
    with pytest.raises(FewerError, match="layer=0"):
        DyCoke(layer=0)
    for share in (0.0, 1.5):
        with pytest.raises(FewerError, match=f"read={share}"):
            DyCoke(read=share)
    for cosine in (1.1, -0.1):
        with pytest.raises(FewerError, match=f"alike={cosine}"):
            DyCoke(alike=cosine)


def test_what_deeper_layers_read_is_asked_for() -> None:
    """As the authors' settings dycoke_l=3, dycoke_p=0.7; how it is carried out is tested with the adapters."""
    assert DyCoke().dynamic == Dynamic(layer=3, read=0.3, alike=0.9)
    assert DyCoke(official=True).dynamic == Dynamic(3, 0.3, 0.9, official=True)
    assert DyCoke(read=1.0).dynamic is None


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_in_a_model(family: str) -> None:
    through("dycoke", family, frames=8)
