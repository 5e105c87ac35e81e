"""ALGM: windows of neighbours merge first, then pairs anywhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.errors import BudgetError, UnsupportedModel
from fewer.methods.vit.algm import ALGM
from fewer.types import Tokens
from tests.laws.encoder_battery import LAWS
from tests.methods.vit.build import decide, groups, place


def angled(*degrees: float) -> Tensor:
    """Tokens of unit length at these angles, `(1, n, 2)`."""
    turned = torch.tensor(degrees).deg2rad()
    return torch.stack([turned.cos(), turned.sin()], -1).unsqueeze(0)


def smooth(rows: int, columns: int, d: int = 16, seed: int = 7) -> Tensor:
    """A class token and patches of which windows are more or less alike, `(1, 1 + rows * columns, d)`."""
    draw = torch.Generator().manual_seed(seed)
    wide = [1, rows // 2, columns // 2]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 1).repeat_interleave(2, 2)

    coarse = spread(torch.randn(*wide, d, generator=draw))
    amount = spread(torch.rand(*wide, 1, generator=draw))
    x = coarse + amount * torch.randn(1, rows, columns, d, generator=draw)
    return torch.cat([torch.randn(1, 1, d, generator=draw), x.reshape(1, rows * columns, d)], 1)


def naive_windows(tokens: Tokens, row: int) -> list[tuple[float, list[int]]]:
    """Every window's mean cosine and members, in the grid's order."""
    assert tokens.site.grid is not None
    rows, columns = tokens.site.grid
    found = []
    for top in range(0, rows - 1, 2):
        for left in range(0, columns - 1, 2):
            at = [tokens.site.prefix + y * columns + x for y in (top, top + 1) for x in (left, left + 1)]
            pairs = [(i, j) for i in at for j in at if i != j]
            x = tokens.features[row]
            found.append((sum(float(F.cosine_similarity(x[i], x[j], dim=0)) for i, j in pairs) / 12, at))
    return found


def naive_counted(tokens: Tokens, row: int, leave: int) -> list[list[int]]:
    slots = {i: [i] for i in range(tokens.features.shape[1])}
    for _, members in sorted(naive_windows(tokens, row), key=lambda one: -one[0]):
        for member in members[1:]:
            if leave:
                slots[members[0]].append(member)
                del slots[member]
                leave -= 1
    return list(slots.values())


def test_worked_example() -> None:
    """Two windows side by side, columns 0 and 1 and columns 2 and 3. The left one's patches 1, 2, 5, 6 look to
    0, 10, 10, 0 degrees: four pairs are 10 degrees apart and two not at all, the mean cosine is 0.99. The right one's
    3, 4, 7, 8 look to 0, 90, 90, 0: a third. Of eight five are to stay, so the left window becomes one, at patch 1."""
    tokens = place(9, rows=1, grid=(2, 4), features=angled(45, 0, 10, 0, 90, 10, 0, 90, 0))
    plan = decide(ALGM(), tokens, 5)
    assert -ALGM().score(tokens).value[0, [2, 4]] == pytest.approx([(2 + 4 * 0.9848) / 6, 1 / 3], abs=1e-4)
    assert groups(plan) == [[0], [1, 2, 5, 6], [3], [4], [7], [8]]
    assert plan.mass is not None and plan.mass.tolist() == [[1, 4, 1, 1, 1, 1]]
    torch.testing.assert_close(plan.apply(tokens.features)[0, 1], tokens.features[0, [1, 2, 5, 6]].mean(0))


@pytest.mark.parametrize("grid", [(6, 6), (4, 8), (5, 7), (3, 2)])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.55])
def test_windows_agree_with_the_reference(grid: tuple[int, int], keep: float) -> None:
    """Odd grids too: their last row and column fill no window."""
    n = grid[0] * grid[1]
    tokens = place(1 + n, grid=grid, seed=sum(grid))
    plan = decide(ALGM(), tokens, keep)
    for row in range(2):
        assert groups(plan, row) == naive_counted(tokens, row, n - -int(-keep * n // 1))


@pytest.mark.parametrize("layer", [4, 6])
@pytest.mark.parametrize("n", [9, 20, 37])
def test_pairs_agree_with_the_reference(n: int, layer: int) -> None:
    tokens = place(n, rows=1, seed=n, at=1, places=2, layer=layer, layers=12)
    unit = F.normalize(tokens.features[0], dim=-1)
    best = {i: max((float(unit[i] @ unit[j]), j) for j in range(1, n, 2)) for i in range(2, n, 2)}
    alike = torch.tensor([cosine for cosine, _ in best.values()])
    least = float(alike.mean() + alike.std() / (layer + 1))
    slots = {i: [i] for i in range(n)}
    for i, (cosine, j) in best.items():
        if cosine >= least:
            slots[j] = sorted([*slots[j], i])
            del slots[i]
    assert groups(decide(ALGM(0.9), tokens, 2)) == list(slots.values())


def test_two_pairs_deviate_by_more_than_half_their_distance() -> None:
    """Cosines 1 and 0 deviate by 0.71, not 0.5, from their mean: block 1 would merge neither, block 2 one."""
    tokens = angled(45, 0, 0, 0, 90)
    for layer, count in ((0, 5), (1, 4)):
        there = place(5, rows=1, features=tokens, at=1, places=2, layer=layer, layers=12)
        assert decide(ALGM(0.9), there, 2).counts.tolist() == [count]


def test_authors_code_merges_the_same() -> None:
    """Golden: what conditional_pooling at 0.88 and 0.5 and turbo_matching at layers 5 and 7 choose on `smooth(6, 6)`
    (tue-mps/algm-segmenter, algm/local_merge.py and global_merge.py, 06003d5), by a port of those lines."""
    x = smooth(6, 6)
    alike = [[1, 2, 7, 8], [3, 4, 9, 10], [27, 28, 33, 34], [29, 30, 35, 36]]
    more = [[1, 2, 7, 8], [3, 4, 9, 10], [5, 6, 11, 12], [13, 14, 19, 20], [17, 18, 23, 24], [25, 26, 31, 32]]
    for threshold, expected in ((0.88, alike), (0.5, more + alike[2:])):
        plan = decide(ALGM(threshold), place(37, rows=1, grid=(6, 6), features=x), 1)
        assert [one for one in groups(plan) if len(one) > 1] == expected
    fifth = [[1, 2], [7, 8], [4, 9, 10], [14, 19], [25, 32], [29, 36], [28, 33, 34], [30, 35]]
    seventh = [[1, 2], [7, 8], [4, 9, 10], [14, 19, 20], [25, 32], [29, 36], [28, 33, 34], [30, 35]]
    for layer, expected in ((5, fifth), (7, seventh)):
        tokens = place(37, rows=1, grid=(6, 6), features=x, at=1, places=2, layer=layer - 1, layers=12)
        assert [one for one in groups(decide(ALGM(0.88), tokens, 1)) if len(one) > 1] == expected


def test_a_row_merges_what_it_may_whatever_the_others_do() -> None:
    """In a batch with noise, where the authors would merge as little as the noise may."""
    x = torch.cat(
        [smooth(6, 6), smooth(6, 6, seed=8), torch.randn(1, 37, 16, generator=torch.Generator().manual_seed(0))]
    )
    plan = decide(ALGM(0.88), place(37, rows=3, grid=(6, 6), features=x), 1)
    for row in range(3):
        alone = decide(ALGM(0.88), place(37, rows=1, grid=(6, 6), features=x[row : row + 1]), 1)
        assert groups(plan, row) == groups(alone)
    assert plan.counts.tolist()[0] == 37 - 12 and plan.counts.tolist()[2] == 37


def test_the_budget_is_the_least_that_stays_beside_a_threshold() -> None:
    tokens = place(37, rows=1, grid=(6, 6), features=smooth(6, 6))
    assert decide(ALGM(0.88), tokens, 30).counts.tolist() == [31]
    assert decide(ALGM(0.88), tokens, 2).counts.tolist() == [25]
    assert decide(ALGM(1.0), tokens, 2).counts.tolist() == [37]
    assert ALGM().exact and not ALGM().floor and ALGM(0.9).floor and not ALGM(0.9).exact


@pytest.mark.parametrize("law", LAWS)
def test_obeys_with_a_threshold(law: str) -> None:
    LAWS[law](ALGM(0.1))


def test_protected_patches_stay_out_of_their_window() -> None:
    tokens = place(9, rows=1, grid=(2, 4), features=angled(45, 0, 10, 0, 90, 10, 0, 90, 0), protect=(5,))
    assert groups(decide(ALGM(), tokens, 4)) == [[0], [1], [2], [3, 4, 7, 8], [5], [6]]


def test_constant_images_merge_to_the_count() -> None:
    tokens = place(37, rows=1, grid=(6, 6), features=torch.ones(1, 37, 16))
    assert decide(ALGM(), tokens, 0.5).counts.tolist() == [19]


def test_places() -> None:
    assert [ALGM().places(layers) for layers in (12, 24, 4, 1)] == [[0, 4], [0, 6], [0, 1], [0, 0]]


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"38 tokens.*grid is \(6, 6\)"):
        decide(ALGM(), place(38, grid=(6, 6)))
    with pytest.raises(UnsupportedModel, match="grid is None"):
        decide(ALGM(), place(37))
    with pytest.raises(BudgetError, match=r"threshold=88.0 is no cosine"):
        ALGM(threshold=88.0)
