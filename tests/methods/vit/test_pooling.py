"""Pooling: the mean of each cell of a coarser grid."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fewer.allocate.lattice import nearest
from fewer.errors import BudgetError, UnsupportedModel
from fewer.methods.vit.pooling import Pooling
from fewer.types import Plan
from tests.methods.vit.build import decide, groups, kept, place


def test_worked_example() -> None:
    """A class token and a grid of four by four, the patches worth 0 to 15: four cells are the quadrants.

    The first quadrant holds 0, 1, 4 and 5, their mean is 2.5; one to the right is 2 more, one below 8 more. All four
    patches of a cell are as near to its middle, so the first gives it its place.
    """
    tokens = place(
        17, rows=1, grid=(4, 4), features=torch.cat([torch.tensor([99.0]), torch.arange(16.0)]).view(1, 17, 1)
    )
    plan = decide(Pooling(), tokens, 4)
    assert groups(plan) == [[0], [1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert kept(plan) == [0, 1, 3, 9, 11]
    assert plan.apply(tokens.features).flatten().tolist() == [99, 2.5, 4.5, 10.5, 12.5]
    assert plan.mass is not None and plan.mass.tolist() == [[1, 4, 4, 4, 4]]


@pytest.mark.parametrize(("grid", "shape"), [((6, 6), (3, 3)), ((6, 6), (2, 3)), ((8, 12), (4, 4)), ((9, 6), (3, 3))])
def test_it_is_adaptive_average_pooling_where_cells_fit(grid: tuple[int, int], shape: tuple[int, int]) -> None:
    tokens = place(1 + grid[0] * grid[1], grid=grid)
    plan = decide(Pooling(), tokens, shape[0] * shape[1])
    image = tokens.features[:, 1:].transpose(1, 2).unflatten(2, grid)
    expected = F.adaptive_avg_pool2d(image, shape).flatten(2).transpose(1, 2)
    torch.testing.assert_close(plan.apply(tokens.features)[:, 1:], expected)


@pytest.mark.parametrize(("grid", "count"), [((6, 6), 17), ((5, 7), 12), ((14, 14), 50), ((3, 4), 7)])
def test_agrees_with_the_reference(grid: tuple[int, int], count: int) -> None:
    """Cells by division, written as loops; the survivor is the member nearest to the cell's middle."""
    tokens = place(2 + grid[0] * grid[1], grid=grid, prefix=2)
    rows, columns = nearest(*grid, count)
    members: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for y in range(grid[0]):
        for x in range(grid[1]):
            cell = (y * rows // grid[0], x * columns // grid[1])
            middle = ((cell[0] + 0.5) * grid[0] / rows - 0.5, (cell[1] + 0.5) * grid[1] / columns - 0.5)
            off = round((y - middle[0]) ** 2 + (x - middle[1]) ** 2, 6)
            members.setdefault(cell, []).append((off, 2 + y * grid[1] + x))
    chosen = sorted((min(found)[1], sorted(at for _, at in found)) for found in members.values())
    plan = decide(Pooling(), tokens, count)
    assert kept(plan) == [0, 1] + [at for at, _ in chosen]
    assert groups(plan)[2:] == [found for _, found in chosen]


def test_lattices_have_the_most_cells_that_fit() -> None:
    """Against every lattice there is: none that fits, with cells at most twice as long as wide, has more cells."""
    for grid in ((6, 6), (5, 9), (14, 14)):
        for count in range(1, grid[0] * grid[1] + 1):
            rows, columns = nearest(*grid, count)
            best = 0
            for h in range(1, grid[0] + 1):
                for w in range(1, grid[1] + 1):
                    tall, wide = grid[0] / h, grid[1] / w
                    if h * w <= count and max(tall / wide, wide / tall) <= 2 + 1e-9:
                        best = max(best, h * w)
            assert rows * columns == best, (grid, count)


def test_a_grid_that_is_a_stripe_gets_a_stripe() -> None:
    assert nearest(1, 12, 5) == (1, 5) and nearest(12, 1, 3) == (3, 1)


def test_what_was_pooled_is_pooled_again_by_its_place() -> None:
    """36 patches to 9, then to 4: the second lattice's cells are those of the original grid, and sizes are counted.

    Survivors of three by three cells are the first of two by two patches: rows 0, 2 and 4 of six. The second lattice
    cuts six rows at 3: rows 0 and 2 fall into its first half, row 4 into the second; columns likewise.
    """
    tokens = place(37, grid=(6, 6))
    first = decide(Pooling(), tokens, 9)
    assert isinstance(first, Plan)
    left = replace(
        place(10, grid=(6, 6)),
        features=first.apply(tokens.features),
        positions=first.survivors,
        mass=first.mass,
        seen=tokens.seen,
    )
    second = decide(Pooling(), left, 4)
    assert groups(second) == [[0], [1, 2, 4, 5], [3, 6], [7, 8], [9]]
    assert second.mass is not None and second.mass[0].tolist() == [1, 16, 8, 8, 4]
    both = first.then(second)
    torch.testing.assert_close(both.apply(tokens.features), second.apply(left.features))
    cell = tokens.features[:, [1 + 6 * y + x for y in range(4) for x in range(4)]].mean(1)
    torch.testing.assert_close(both.apply(tokens.features)[:, 1], cell)


def test_cells_without_tokens_are_no_tokens() -> None:
    """Five patches are left of sixteen, in the first and the last quadrant: four cells are paid for, two are there."""
    tokens = place(6, rows=1, grid=(4, 4))
    tokens = replace(tokens, positions=torch.tensor([[0, 1, 2, 5, 12, 16]]), seen=torch.tensor([17]))
    assert groups(decide(Pooling(), tokens, 4)) == [[0], [1, 2, 3], [4, 5]]
    assert groups(decide(Pooling(), tokens, 5)) == [[0], [1], [2], [3], [4], [5]], "a budget for all leaves all"


def test_rows_may_be_protected_differently() -> None:
    """A protected patch stays alone, and its row's lattice is so much smaller."""
    tokens = place(17, grid=(4, 4))
    protected = tokens.protected.clone()
    protected[1, 6] = True
    tokens = replace(tokens, protected=protected)
    plan = decide(Pooling(), tokens, 4)
    assert groups(plan, 0) == [[0], [1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]
    assert [6] in groups(plan, 1) and int(plan.counts[1]) <= 5


def test_places() -> None:
    assert Pooling().places(12) == [3]
    assert Pooling(at=(0.25, 0.5)).places(24) == [6, 12]
    assert Pooling(at=(0.99,)).places(4) == [3]


@pytest.mark.parametrize("at", [(), (1.0,), (-0.1, 0.5)])
def test_bad_places(at: tuple[float, ...]) -> None:
    with pytest.raises(BudgetError, match=r"Pooling\(at=.*\[0, 1\)"):
        Pooling(at=at)


def test_without_a_grid_it_says_so() -> None:
    with pytest.raises(UnsupportedModel, match=r"shows none.*'tome'"):
        decide(Pooling(), place(17), 4)
