from typing import Any

import pytest
import torch

from fewer.allocate.bands import bands
from fewer.methods.vlm.visual_pooling import VisualPooling
from tests.methods.vlm.build import lay, place
from tests.methods.vlm.waves import decide, kept, through, video, waves


def pooled(tokens: Any, keep: int) -> torch.Tensor:
    return decide(VisualPooling(), tokens, keep).apply(tokens.features)[0]


def test_quarters() -> None:
    x = torch.arange(16.0).view(16, 1)
    tokens = place(16, features=x, grid=(4, 4))
    assert pooled(tokens, 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert kept(VisualPooling(), tokens, 4) == [0, 2, 8, 10]


def test_a_band_with_one_cell_more() -> None:
    x = torch.arange(16.0).view(16, 1)
    # five of sixteen: two cells above, three below, of two columns, one and one
    assert pooled(place(16, features=x, grid=(4, 4)), 5).flatten().tolist() == [2.5, 4.5, 10.5, 12.0, 13.0]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 3), (3, 6)])
def test_as_torch_pools(shape: tuple[int, int]) -> None:
    x = waves(36, 5)
    mean = torch.nn.functional.adaptive_avg_pool2d(x.T.view(5, 6, 6), shape).flatten(1).T
    assert torch.allclose(pooled(place(36, features=x, grid=(6, 6)), shape[0] * shape[1]), mean, atol=1e-6)


def naive(x: torch.Tensor, h: int, w: int, keep: int) -> set[tuple[float, ...]]:
    """The means of all cells, cell by cell."""
    lattice = bands(h, w, keep)
    found = set()
    for band, many in enumerate(lattice.counts):
        for cell in range(many):
            members = [
                y * w + x_
                for y in range(h)
                for x_ in range(w)
                for across, along in [(x_, y) if lattice.turned else (y, x_)]
                if across * len(lattice.counts) // lattice.along[0] == band and along * many // lattice.along[1] == cell
            ]
            found.add(tuple(round(float(v), 4) for v in x[members].mean(0)))
    return found


@pytest.mark.parametrize("keep", range(1, 31))
def test_every_count_of_a_grid(keep: int) -> None:
    x = waves(30, 3)
    out = pooled(place(30, features=x, grid=(5, 6)), keep)
    assert out.shape == (keep, 3)
    assert {tuple(round(float(v), 4) for v in row) for row in out} == naive(x, 5, 6, keep)


@pytest.mark.parametrize(("h", "w"), [(1, 9), (9, 1), (2, 13), (7, 7), (24, 24)])
def test_every_count_of_every_grid(h: int, w: int) -> None:
    for count in range(1, h * w + 1):
        lattice = bands(h, w, count)
        assert sum(lattice.counts) == count
        assert max(lattice.counts) - min(lattice.counts) <= max(1, count // len(lattice.counts))
        assert len(lattice.counts) <= lattice.along[0]
        assert 1 <= min(lattice.counts) <= max(lattice.counts) <= lattice.along[1]


def test_crops_share_and_may_get_nothing() -> None:
    tokens = place(13, layout=lay([(3, 3), (2, 2)]))
    plan = decide(VisualPooling(), tokens, 4)
    assert [int(i) // 9 for i in plan.survivors[0]] == [0, 0, 0, 1]
    alone = decide(VisualPooling(), place(12, layout=video(3, 2, 2)), 2)
    assert (alone.slot[0] == -1).tolist() == [False] * 8 + [True] * 4


def test_what_is_no_rectangle_is_pooled_in_order() -> None:
    layout = lay([(3, 3)]).take(torch.tensor([0, 1, 2, 3, 5, 8]))
    x = torch.arange(6.0).view(6, 1)
    assert pooled(place(6, features=x, layout=layout), 3).flatten().tolist() == [0.5, 2.5, 4.5]
    smaller = lay([(3, 3)]).take(torch.tensor([0, 1, 3, 4]))  # a border was cut off
    assert pooled(place(4, features=x[:4], layout=smaller), 2).flatten().tolist() in ([0.5, 2.5], [1.0, 2.0])


def test_in_a_model() -> None:
    for family in ("llava", "llava_next", "internvl", "idefics3"):
        through("visual-pooling", family)
    through("visual-pooling", "llava_onevision", frames=3)
