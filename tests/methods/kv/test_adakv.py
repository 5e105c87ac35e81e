"""AdaKV: one budget for all heads of a layer."""

import pytest
import torch

from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.snapkv import SnapKV
from fewer.types import Budget
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

SMALL = AdaKV(SnapKV(window=8, kernel=7, pooling="max"))


def test_worked_example() -> None:
    """Key norms 1, 2, 3, 4 at one head and 5, 6, 7, 8 at the other; small ones score high; two a head, four in all.

    All of the layer's best four are at head 0, so n = (4, 0). A floor of one half is sure of 1 each; the other 2 go
    by n to head 0: 3 and 1, as 0.5 * 2 + 0.5 * n says. Head 0 keeps 0, 1, 2 and head 1 its own best, 0.
    """
    keys = torch.arange(1.0, 9).view(2, 4, 1)
    method = AdaKV(KNorm(), floor=0.5)
    tokens = place(method, Row(keys, keys, keys))
    assert kept(tokens, decide(method, 2, tokens)) == [[0, 1, 2], [0]]
    for floor, shape in ((0.0, [4, 0]), (1.0, [2, 2])):
        assert decide(AdaKV(KNorm(), floor), 2, tokens).counts.tolist() == [shape]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, floor: float) -> None:
    row = random_row(n, heads=8, kv_heads=4)
    method = AdaKV(SnapKV(window=8, kernel=5), floor)
    tokens, expected = place(method, row), naive.snapkv(row.query, row.keys, 8, 5, "mean")
    agree(method.score(tokens)[0], expected)
    count = n if n <= 8 else -(-n * 3 // 10)
    shares = naive.adakv(expected, count, floor)
    assert kept(tokens, decide(method, 0.3, tokens)) == [
        naive.best(head, share) for head, share in zip(expected, shares, strict=True)
    ]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("keep", [0.15, 0.3, 0.77, 20, 100])
def test_totals_are_exact_and_floors_are_kept(keep: float | int, floor: float) -> None:
    rows = [random_row(n, heads=8, kv_heads=4) for n in (63, 130)]
    method = AdaKV(SnapKV(window=8, kernel=5), floor)
    tokens = place(method, rows)
    plan = decide(method, keep, tokens)
    allocation = method.allocate(
        tokens, torch.where(tokens.padding, -torch.inf, method.score(tokens)), Budget.parse(keep)
    )
    assert torch.equal(plan.counts, allocation.counts)
    assert allocation.floor is not None and bool((plan.counts >= allocation.floor).all())
    for index, row in enumerate(rows):
        share = Budget.parse(keep).count(len(row))
        assert int(plan.counts[index].sum()) == 4 * share
        assert int(plan.counts[index].min()) >= int(floor * share)


def test_each_head_keeps_its_own_best() -> None:
    row = random_row(63, heads=4, kv_heads=4)
    tokens = place(AdaKV(KNorm()), row)
    for head, scores in zip(kept(tokens, decide(AdaKV(KNorm()), 0.25, tokens)), naive.knorm(row.keys), strict=True):
        assert head == naive.best(scores, len(head))


def test_the_window_stays_at_every_head() -> None:
    tokens = place(SMALL, random_row(63, heads=4, kv_heads=4))
    for head in kept(tokens, decide(SMALL, 0.2, tokens)):
        assert set(range(55, 63)) <= set(head)


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(SMALL, 0.4)
    same_in_chunks(SMALL, 0.4)


def test_needs_and_short_prompts_are_the_scorers() -> None:
    assert SMALL.needs == SMALL.scorer.needs and AdaKV(KNorm()).needs == frozenset()
    tokens = place(SMALL, random_row(7))
    plan = decide(SMALL, 0.5, tokens)
    assert kept(tokens, plan) == [list(range(7))] * 2
    assert "[7] tokens are no longer than the window of 8" in plan.note


def test_a_budget_below_the_window_is_shared_alike() -> None:
    """Every head's window must stay and none can: no head is better than another, so each keeps its last four."""
    tokens = place(SMALL, random_row(30, heads=4, kv_heads=4))
    assert kept(tokens, decide(SMALL, 4, tokens)) == [[26, 27, 28, 29]] * 4


@pytest.mark.parametrize(
    ("method", "seed", "theirs"),
    [
        (
            AdaKV(SnapKV(window=8, kernel=7, pooling="max"), floor=0.2),
            0,
            [
                [3, 4, 5, 6, 7, 8, *range(35, 42)],
                [*range(19, 26), *range(28, 34)],
                [*range(43, 51)],
                [*range(1, 13)],
            ],
        ),
        (
            AdaKV(SnapKV(window=8, kernel=5), floor=0.5),
            3,
            [
                [9, 10, 11, 12, 19, 20, 21, 22, *range(25, 30)],
                [1, 2, 14, 15, 16, 17, *range(28, 34)],
                [2, 3, 4, 5, 14, 38, 39, 46, 47, 48, 49],
                [1, 2, 3, 4, 5, 15, 16, 21, 22, 23, 24, 25],
            ],
        ),
    ],
    ids=["max", "mean"],
)
def test_the_authors_code_keeps_the_same_but_for_rounding(method: AdaKV, seed: int, theirs: list[list[int]]) -> None:
    """Golden: AdaKVCluster.update_kv (Zefan-Cai/KVCache-Factory c97f9d7), normalize=False, one query head a key head.

    window_size 8, max_capacity_prompt 20, on random_row(60, seed, heads=4, kv_heads=4); the indices before the window.
    Its heads are rounded one by one (78 and 80 in all here), ours add up to 80, so a head may differ by one token: the
    shorter list is then the better part of the longer one.
    """
    tokens = place(method, random_row(60, seed=seed, heads=4, kv_heads=4))
    ours = kept(tokens, decide(method, 20, tokens))
    assert sum(len(head) for head in ours) == 80
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[-8:] == list(range(52, 60))
        assert abs(len(mine) - 8 - len(other)) <= 1
        assert set(mine[:-8]) <= set(other) or set(other) <= set(mine[:-8])
