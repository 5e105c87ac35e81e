"""FastKV: SnapKV's rule with a small window, and which tokens of a prompt go on to later layers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewer.compress import rate
from fewer.methods.kv.fastkv import FastKV
from fewer.methods.kv.snapkv import SnapKV
from fewer.types import BudgetError, FewerError, Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)


def went_on(method: FastKV, tokens: Tokens, row: int = 0) -> list[int]:
    """Positions of a row's tokens that go on."""
    plan = method.go_on(tokens, rate(method, tokens))
    plan.check(tokens.padding[:, 0])
    at = plan.survivors[row][plan.survivors[row] >= 0]
    found: list[int] = tokens.positions[row, 0, at].tolist()
    return found


def test_worked_example() -> None:
    """Two key-value heads of one channel, a window of one query, 1, and no pooling.

    Head 0 has keys ln 6, 1, 1, 1, 1, its weights are 6, 1, 1, 1, 1 tenths; head 1 has ln 1, 2, 5, 1, 1, also tenths.
    Before the window (token 4) head 0 likes token 0 best, head 1 token 2; each keeps two: its best and the window.
    Summed over heads: 7, 3, 6, 2 tenths, so of three that go on token 0 and 2 go with the window, of two token 0.
    """
    keys = torch.tensor([[[6.0], [1], [1], [1], [1]], [[1], [2], [5], [1], [1]]]).log()
    method = FastKV(window=1, kernel=1, rate=0.6)
    tokens = place(method, Row(torch.ones(2, 5, 1), keys, keys))
    expected = torch.tensor([[6, 1, 1, 1, torch.inf], [1, 2, 5, 1, torch.inf]]) / 10
    agree(method.score(tokens)[0], expected)
    assert kept(tokens, decide(method, 2, tokens)) == [[0, 4], [2, 4]]
    assert went_on(method, tokens) == [0, 2, 4]
    assert went_on(FastKV(window=1, kernel=1, rate=2), tokens) == [0, 4]


def reference(row: Row, count: int, window: int, kernel: int) -> list[int]:
    """The votes of all query heads, from the whole attention matrix, token by token."""
    n, before = len(row), max(len(row) - window, 0)
    weights, votes = naive.attention(row.query, row.keys), [0.0] * before
    for head in weights:
        seen = [sum(float(head[i, j]) for i in range(before, n)) for j in range(before)]
        for j in range(before):
            near = range(max(0, j - kernel // 2), min(before, j + kernel // 2 + 1))
            votes[j] += sum(seen[i] for i in near) / kernel
    return [*naive.best(votes, min(max(count - window, 0), before)), *range(before, n)]


@pytest.mark.parametrize(("window", "kernel"), [(8, 7), (1, 1), (4, 3)])
@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize("n", SIZES)
def test_what_goes_on_agrees_with_the_reference(n: int, heads: int, window: int, kernel: int) -> None:
    row = random_row(n, heads=heads)
    for share in (0.25, 0.5, 30):
        method = FastKV(window, kernel, rate=share)
        count = -(-n * int(share * 100) // 100) if share < 1 else int(share)
        assert went_on(method, place(method, row)) == reference(row, count, window, kernel)


@pytest.mark.parametrize("n", SIZES)
def test_the_cache_is_cut_as_by_snapkv(n: int) -> None:
    """Sums over a group and over the window rank as SnapKV's means do, and the same pooling comes before both."""
    row = random_row(n)
    fast, snap = FastKV(), SnapKV(window=8, kernel=7)
    for keep in (0.25, 12, 1.0):
        mine, theirs = place(fast, row), place(snap, row)
        assert kept(mine, decide(fast, keep, mine)) == kept(theirs, decide(snap, keep, theirs))


def test_what_is_kept_does_not_depend_on_what_goes_on() -> None:
    row = random_row(63)
    plans = {share: decide(FastKV(rate=share), 0.4, place(FastKV(rate=share), row)) for share in (0.1, 0.5, 1.0)}
    assert all(torch.equal(plan.slot, plans[0.1].slot) for plan in plans.values())


def test_rows_stand_alone() -> None:
    same_alone_and_padded(FastKV(), 0.4)
    same_alone_and_padded(FastKV(), 0.4, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(FastKV(), 0.4)


@pytest.mark.parametrize("filler", [50.0, torch.nan])
def test_each_row_sends_on_what_it_would_alone(filler: float) -> None:
    method, rows = FastKV(rate=0.3), [random_row(n, seed=n) for n in SIZES]
    batch = place(method, rows, filler=filler)
    for index, row in enumerate(rows):
        alone = went_on(method, place(method, row))
        assert went_on(method, batch, index) == alone
        assert len(alone) == max(-(-len(row) * 3 // 10), min(len(row), 8))


def test_what_was_dropped_before_makes_no_difference_to_the_count() -> None:
    """Later layers hold fewer tokens than were seen; they keep the same share of what was seen, or all they have."""
    tokens = place(FastKV(), random_row(40))
    later = replace(tokens, seen=torch.tensor([160]))
    assert decide(FastKV(), 0.1, later).counts.tolist() == [[16, 16]]
    assert decide(FastKV(), 0.5, later).counts.tolist() == [[40, 40]]


@pytest.mark.parametrize(
    ("layer", "layers", "chosen"), [(15 / 32, 32, 15), (15 / 32, 30, 14), (15 / 32, 1, 0), (0.29, 100, 29), (3, 4, 3)]
)
def test_the_layer_is_an_index_or_a_fraction(layer: float, layers: int, chosen: int) -> None:
    assert FastKV(layer=layer).shortens(layers) == chosen


@pytest.mark.parametrize("layer", [4, -1, 1.0, 1.5])
def test_a_layer_that_is_not_there(layer: float) -> None:
    with pytest.raises(FewerError, match=r"of the 4 layers to compress"):
        FastKV(layer=layer).shortens(4)


@pytest.mark.parametrize("share", [0.0, 1.5, "x", 0, "64MB"])
def test_rates_that_mean_nothing(share: float | str) -> None:
    with pytest.raises((BudgetError, FewerError)):
        FastKV(rate=share)


GOLDEN: dict[int, tuple[list[list[int]], list[int]]] = {
    5: (
        [
            [14, 15, 16, 29, 30, 48, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59],
            [13, 14, 21, 22, 23, 24, 47, 48, 52, 53, 54, 55, 56, 57, 58, 59],
        ],
        [12, 13, 14, 15, 16, 17, 24, 29, 47, 48, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59],
    ),
    6: (
        [
            [12, 13, 14, 15, 16, 17, 34, 35, 52, 53, 54, 55, 56, 57, 58, 59],
            [13, 14, 15, 16, 17, 18, 19, 23, 52, 53, 54, 55, 56, 57, 58, 59],
        ],
        [12, 13, 14, 15, 16, 17, 18, 19, 22, 23, 34, 35, 52, 53, 54, 55, 56, 57, 58, 59],
    ),
}


@pytest.mark.parametrize("seed", GOLDEN)
def test_the_authors_code_chooses_the_same(seed: int) -> None:
    """Golden: FastKVCluster.update_kv (dongwonjo/FastKV b978769, baselines/fastkv/utils.py), eviction_mode "constant".

    On random_row(60) with queries times 4: window 8, kernel 7, max_capacity_prompt 16, tsp_length 20; the columns of
    the keys it keeps, and its tsp_indices.
    """
    row = random_row(60, seed=seed)
    method = FastKV(rate=20)
    tokens = place(method, Row(row.query * 4, row.keys, row.values))
    cache, on = GOLDEN[seed]
    assert kept(tokens, decide(method, 16, tokens)) == cache
    assert went_on(method, tokens) == on


def test_scores_of_tokens_that_must_stay_are_no_overflow_to_nan() -> None:
    """Forced scores are the largest float there is; summed over heads they stay above all others."""
    method = FastKV(window=3, rate=4)
    tokens = place(method, random_row(12, heads=8, kv_heads=8))
    scores: Tensor = rate(method, tokens)
    assert not bool(scores.sum(1).isnan().any())
    assert went_on(method, tokens)[-3:] == [9, 10, 11]
