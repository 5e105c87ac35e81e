import math

import pytest
import torch

from fewer.methods.vlm.vidcom2 import VidCom2
from fewer.types import FewerError
from tests.methods.vlm.build import lay, place
from tests.methods.vlm.waves import drifting, kept, through, video, waves


def naive(x: list[list[float]]) -> list[float]:
    """The scores of one frame, whose mean is the video's too, token by token."""
    n, d = len(x), len(x[0])
    means = [sum(row[c] for row in x) / n for c in range(d)]
    spread = [sum((row[c] - means[c]) ** 2 for row in x) for c in range(d)]
    calm = sorted(range(d), key=lambda c: spread[c])[: d // 2]
    unit = []
    for row in x:
        length = math.sqrt(sum(row[c] ** 2 for c in calm))
        unit.append([row[c] / length for c in calm])
    middle = [sum(row[i] for row in unit) / n for i in range(len(calm))]
    far = [sum((a - b) ** 2 for a, b in zip(row, middle, strict=True)) for row in unit]
    return [-2 * sum(math.exp(-f / (2 * 2.0**k)) for k in range(-3, 2)) for f in far]


def test_the_odd_token_of_each_frame() -> None:
    # two frames of three; the third channel, and not the others, tells the odd one of each
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    tokens = place(6, features=x, layout=video(2, 1, 3))
    assert kept(VidCom2(channels=1.0), tokens, 2) == [2, 3]


def test_more_for_the_unusual_frame() -> None:
    tokens = place(36, features=drifting(), layout=video(4, 3, 3))
    counts = torch.bincount(torch.tensor(kept(VidCom2(), tokens, 16)) // 9).tolist()
    assert counts == [3, 3, 3, 7]
    even = torch.bincount(torch.tensor(kept(VidCom2(temperature=100.0), tokens, 16)) // 9).tolist()
    assert even == [4, 4, 4, 4]


def test_as_in_plain_python() -> None:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    tokens = place(12, features=x, grid=(3, 4))
    assert VidCom2().score(tokens)[0].tolist() == pytest.approx(naive(x.tolist()), abs=1e-4)


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        (False, [6, 9, 17, 21, 23, 25, 28]),
        (False, [4, 6, 7, 9, 15, 17, 19, 20, 21, 23, 25, 26, 28, 32, 34]),
        (False, [4, 6, 7, 8, 9, 11, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 28, 31, 32, 34]),
        (True, [4, 13, 22, 28, 31, 32]),
        (True, [4, 7, 13, 16, 22, 24, 28, 29, 31, 32]),
        (True, [3, 4, 6, 7, 12, 13, 15, 16, 21, 22, 24, 25, 27, 28, 29, 30, 31, 32, 33, 34, 35]),
    ],
)
def test_as_the_authors(drift: bool, expected: list[int]) -> None:
    # from the functions of token_compressor/vidcom2/vidcom2.py of xuyang-liu16/VidCom2 with base = count / 36 and nine
    # tokens a frame, where their rounding gives that count
    tokens = place(36, features=drifting() if drift else waves(36, 12), layout=video(4, 3, 3))
    assert kept(VidCom2(), tokens, len(expected)) == expected


@pytest.mark.parametrize("count", [1, 3, 4, 5, 35])
def test_exact_counts(count: int) -> None:
    found = kept(VidCom2(), place(36, features=drifting(), layout=video(4, 3, 3)), count)
    assert len(found) == count
    if count >= 4:
        assert {i // 9 for i in found} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("grids", "keep", "expected"),
    [
        ([(10, 10), (1, 1), (1, 1), (1, 1)], 5, [2, 1, 1, 1]),  # rounded shares alone give 4, 1, 0, 0
        ([(10, 10), (1, 1), (1, 1), (1, 1)], 4, [1, 1, 1, 1]),
        ([(6, 6), (6, 6), (1, 3)], 3, [1, 1, 1]),
    ],
)
def test_a_small_frame_has_a_say(grids: list[tuple[int, int]], keep: int, expected: list[int]) -> None:
    layout = lay(grids)
    found = kept(VidCom2(), place(len(layout), d=16, layout=layout), keep)
    assert torch.bincount(layout.crop[found], minlength=len(grids)).tolist() == expected


def test_crops_and_copies() -> None:
    assert len(kept(VidCom2(), place(13, layout=lay([(3, 3), (2, 2)])), 5)) == 5
    assert len(kept(VidCom2(), place(8, features=torch.ones(8, 4), layout=video(2, 2, 2)), 3)) == 3


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="channels=0"):
        VidCom2(channels=0.0)
    with pytest.raises(FewerError, match="temperature=0"):
        VidCom2(temperature=0.0)


def test_in_a_model() -> None:
    through("vidcom2", "internvl")
    through("vidcom2", "qwen2_5_vl", frames=4)
