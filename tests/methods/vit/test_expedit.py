"""Expedit: soft superpixels on a lattice."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fewer.allocate.lattice import nearest
from fewer.errors import BudgetError, UnsupportedModel
from fewer.methods.vit.expedit import Expedit
from fewer.reduce.mix import mix
from fewer.types import Plan, Transform
from tests.methods.vit.build import decide, kept, place


def row_of(*at: float) -> torch.Tensor:
    return torch.tensor([99.0, *at]).view(1, -1, 1)


def test_worked_example() -> None:
    """Four patches in a row, worth 0, 1, 3 and 4, to two, in one round; the temperature is ln 2.

    The first centres are 1/2 and 7/2. Squared distances are 1/4 and 49/4 for 0, so it gives the first centre 2^12 for
    each 1 to the second, 4096/4097; 1/4 and 25/4 for 1, 64/65. The others are their mirror images. All shares to one
    centre make 2, so the first becomes (64/65 + 3/65 + 4/4097) / 2.
    """
    tokens = place(5, rows=1, grid=(1, 4), features=row_of(0, 1, 3, 4))
    found = decide(Expedit(rounds=1, temperature=math.log(2)), tokens, 2)
    assert isinstance(found, Transform) and kept(found) == [0, 1, 3]
    first = (67 / 65 + 4 / 4097) / 2
    torch.testing.assert_close(found.apply(tokens.features).flatten(), torch.tensor([99, first, 4 - first]))
    assert found.mass is not None
    torch.testing.assert_close(found.mass, torch.tensor([[1.0, 2, 2]]))


def test_centres_out_of_reach_get_nothing() -> None:
    """Eight patches in a row to four cells: with a reach of 1 a patch joins its own cell and the next ones alone."""
    tokens = place(9, rows=1, grid=(1, 8))
    found = decide(Expedit(reach=1, temperature=1e-6), tokens, 4)
    assert isinstance(found, Transform)
    mixed = found.matrix[0, 1:, 1:] > 0
    cell = torch.arange(8) // 2
    assert torch.equal(mixed, (cell - torch.arange(4).unsqueeze(1)).abs() <= 1)
    alone = decide(Expedit(reach=0), tokens, 4)
    torch.testing.assert_close(alone.apply(tokens.features)[:, 1:], tokens.features[:, 1:].unflatten(1, (4, 2)).mean(2))


def naive(x: torch.Tensor, grid: tuple[int, int], shape: tuple[int, int], method: Expedit) -> torch.Tensor:
    """The clusters `(cells, d)` of one image `(patches, d)`, patch by patch."""
    image = x.T.reshape(1, -1, *grid)
    centres = list(F.adaptive_avg_pool2d(image, shape)[0].flatten(1).T)
    for _ in range(method.rounds):
        total, share = [torch.zeros(x.shape[1]) for _ in centres], [0.0] * len(centres)
        for at in range(len(x)):
            home = (at // grid[1] * shape[0] // grid[0], at % grid[1] * shape[1] // grid[1])
            near = {}
            for k, centre in enumerate(centres):
                if max(abs(k // shape[1] - home[0]), abs(k % shape[1] - home[1])) <= method.reach:
                    near[k] = math.exp(-method.temperature * float((x[at] - centre).square().sum()))
            for k, weight in near.items():
                total[k] = total[k] + x[at] * (weight / sum(near.values()))
                share[k] += weight / sum(near.values())
        centres = [t / s for t, s in zip(total, share, strict=True)]
    return torch.stack(centres)


@pytest.mark.parametrize(
    ("grid", "count", "method"),
    [
        ((6, 6), 9, Expedit()),
        ((7, 9), 20, Expedit(temperature=0.1)),
        ((8, 8), 30, Expedit(temperature=0.1, rounds=2, reach=1)),
    ],
)
def test_agrees_with_the_reference(grid: tuple[int, int], count: int, method: Expedit) -> None:
    tokens = place(2 + grid[0] * grid[1], grid=grid, prefix=2, seed=1)
    found = decide(method, tokens, count)
    for row in range(2):
        expected = naive(tokens.features[row, 2:], grid, nearest(*grid, count), method)
        torch.testing.assert_close(found.apply(tokens.features)[row, 2:], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.apply(tokens.features)[row, :2], tokens.features[row, :2]), "kept out of the clusters"


def test_the_authors_find_the_same_clusters() -> None:
    """Golden: TokenClusteringBlock(num_spixels=9, temperture=0.2) of segment_anything/modeling/
    hourglass_image_encoder.py (Expedit-LargeScale-Vision-Transformer/Expedit-SAM at 75a1c30) on the patches of
    place(37, grid=(6, 6)): the first channel of the first image's clusters."""
    tokens = place(37, grid=(6, 6))
    found = decide(Expedit(temperature=0.2), tokens, 9).apply(tokens.features)
    torch.testing.assert_close(
        found[0, 1:, 0],
        torch.tensor([-0.01841, -0.12447, -0.07789, -0.03959, -0.10398, -0.09631, -0.10678, -0.16362, -0.21193]),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_cluster_that_nobody_joins_keeps_its_survivor() -> None:
    """The second slot is so unlike everybody that it gets nothing: no token of zeros comes of it."""
    tokens = place(4, rows=1, prefix=1)
    plan = Plan.keep(torch.tensor([[True, True, True, False]]))
    likeness = torch.tensor([[[0.0] * 4, [0.0] * 4, [-1e4] * 4]])
    found = mix(tokens, plan, likeness)
    torch.testing.assert_close(found.matrix, torch.tensor([[[1.0, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 1, 0]]]))
    assert found.mass is not None and found.mass.tolist() == [[1, 3, 0]]


def test_it_keeps_patches_of_a_full_budget_and_refuses_no_grid() -> None:
    tokens = place(37, grid=(6, 6))
    assert isinstance(decide(Expedit(), tokens, 36), Plan)
    with pytest.raises(UnsupportedModel, match="shows none"):
        decide(Expedit(), replace(tokens, site=replace(tokens.site, grid=None)), 9)


def test_places() -> None:
    assert Expedit().places(24) == [10] and Expedit().places(12) == [5]
    assert Expedit(after=0.0).places(12) == [0] and Expedit(after=0.99).places(4) == [3]


@pytest.mark.parametrize("bad", [{"after": 1.0}, {"after": -0.5}, {"rounds": 0}, {"temperature": 0.0}, {"reach": -1}])
def test_bad_arguments(bad: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match=rf"Expedit\(.*{next(iter(bad))}={next(iter(bad.values()))}"):
        Expedit(**bad)  # type: ignore[arg-type]
