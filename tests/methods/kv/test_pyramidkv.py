"""PyramidKV: SnapKV's scores under a budget that falls from layer to layer."""

from dataclasses import replace

import pytest

from fewer.methods.kv.pyramidkv import PyramidKV
from fewer.methods.kv.snapkv import SnapKV
from fewer.types import Budget, Site
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Cache,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)

SMALL = PyramidKV(window=8, kernel=5)


def pyramid(method: PyramidKV, row: Row, keep: float | int, layers: int) -> list[list[list[int]]]:
    """What each layer keeps, all layers seeing the same row."""
    out = []
    for layer in range(layers):
        tokens = place(method, row, site=Site(layer, layers))
        out.append(kept(tokens, decide(method, keep, tokens)))
    return out


def counts(method: PyramidKV, n: int, keep: float | int, layers: int) -> list[int]:
    """How many tokens each layer keeps at a head."""
    tokens = place(method, random_row(n))
    scores, budget = method.score(tokens), Budget.parse(keep)
    shares = [
        method.allocate(replace(tokens, site=Site(layer, layers)), scores, budget).counts for layer in range(layers)
    ]
    assert all(int(share.min()) == int(share.max()) for share in shares), "heads are even"
    return [int(share.max()) for share in shares]


def test_worked_example() -> None:
    """Three layers, 12 tokens each on average, a window of 2, beta 10: c = 10 are free.

    Of 100 tokens the last layer gets c / beta = 1, the first 2c - 1 = 19, the middle one 10, and each its window:
    21, 12, 3, together 36 = 3 x 12. Of 16 tokens only 14 are before the window, so the first layer gets 14, the last
    20 - 14 = 6, the middle 10: 16, 12, 8, together 36 again.
    """
    method = PyramidKV(window=2, kernel=1, beta=10)
    assert counts(method, 100, 12, 3) == [21, 12, 3]
    assert counts(method, 16 + 8, 12, 3) == [21, 12, 3]
    assert counts(PyramidKV(window=4, kernel=1, beta=10), 28, 14, 3) == [23, 14, 5]


def test_worked_example_with_little_to_choose_from() -> None:
    """c = 12 - 2 = 10 of 20 tokens: the first layer wants 19 and 18 are there, so the slope is 18, 10, 2."""
    assert counts(PyramidKV(window=2, kernel=1, beta=10), 20, 12, 3) == [20, 12, 4]


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 32])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4, 20])
@pytest.mark.parametrize("n", [63, 130])
def test_layers_share_exactly_the_budget(n: int, keep: float | int, layers: int) -> None:
    share = keep if isinstance(keep, int) else -(-n * int(keep * 100) // 100)
    found = counts(SMALL, n, keep, layers)
    assert sum(found) == share * layers
    free = max(share - 8, 0)
    expected = naive.pyramid(free, layers, 20, n - min(8, share)) if layers > 1 else [free]
    assert found == [share - free + more for more in expected]
    assert found == sorted(found, reverse=True), "never more at a later layer"


@pytest.mark.parametrize("n", SIZES)
def test_short_prompts_and_large_budgets_are_kept_whole(n: int) -> None:
    assert counts(SMALL, n, 1.0, 3) == [n] * 3
    if n <= 8:
        assert counts(SMALL, n, 0.5, 3) == [n] * 3
        note = decide(SMALL, 0.5, place(SMALL, random_row(n), site=Site(1, 3))).note
        assert note == ("" if n == 1 else "rows of [7] tokens are no longer than the window of 8 and are kept whole")


def test_a_budget_below_the_window_is_the_same_everywhere() -> None:
    assert pyramid(SMALL, random_row(63), 5, 3) == [[list(range(58, 63))] * 2] * 3


def test_the_scorers_note_is_passed_on_at_every_layer() -> None:
    tokens = place(SMALL, [random_row(7), random_row(63)])
    for layer in range(3):
        assert "[7] tokens" in decide(SMALL, 0.5, replace(tokens, site=Site(layer, 3))).note


def test_scores_are_snapkvs() -> None:
    row = random_row(63)
    agree(SMALL.score(place(SMALL, row)), SnapKV(window=8, kernel=5).score(place(SMALL, row)))
    agree(SMALL.score(place(SMALL, row))[0], naive.snapkv(row.query, row.keys, 8, 5, "mean"))
    for layer, found in enumerate(pyramid(SMALL, row, 20, 3)):
        expected = naive.snapkv(row.query, row.keys, 8, 5, "mean")
        assert found == [naive.best(head, (8 + 23, 20, 8 + 1)[layer]) for head in expected]


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(SMALL, 0.4)
    same_in_chunks(SMALL, 0.4)


def test_the_total_is_the_budget_after_decoding_too() -> None:
    """A layer that kept much at the prompt has more to choose from later, but the layers' total stays the budget."""
    layers, total, row = 4, 0, random_row(130 + 10)
    for layer in range(layers):
        cache = Cache(SMALL, 30, Site(layer, layers))
        cache.forward(row.part(0, 130))
        cache.forward(row.part(130, 140))
        total += cache.positions.shape[-1]
    assert total == 30 * layers


def test_the_authors_code_keeps_the_same() -> None:
    """Golden: PyramidKVCluster.update_kv (Zefan-Cai/KVCache-Factory c97f9d7) for layers 0 to 2 of 3.

    window_size 8, max_capacity_prompt 28, kernel_size 5, avgpool, beta 20, one query head a key head, on
    random_row(60, seed=2, heads=2). 20 tokens are free, so its integer division is exact: 39, 20 and 1.
    """
    window = list(range(52, 60))
    assert pyramid(SMALL, random_row(60, seed=2, heads=2), 28, 3) == [
        [
            [1, 2, 4, 5, *range(7, 13), *range(15, 37), *range(44, 51), *window],
            [2, *range(4, 27), 29, 33, *range(37, 50), *window],
        ],
        [
            [2, 8, 9, *range(23, 36), 46, 47, 48, 49, *window],
            [*range(5, 15), 18, 19, 20, 22, 23, 39, 40, 41, 42, 43, *window],
        ],
        [[48, *window], [11, *window]],
    ]


def test_the_authors_code_keeps_the_same_where_the_first_layer_keeps_all() -> None:
    """Golden: the same on random_row(44, seed=2, heads=2), where 36 tokens are before the window: 36, 20 and 4."""
    window = list(range(36, 44))
    assert pyramid(SMALL, random_row(44, seed=2, heads=2), 28, 3) == [
        [list(range(44))] * 2,
        [
            [6, *range(8, 15), *range(21, 26), *range(27, 34), *window],
            [*range(4, 12), *range(13, 24), 33, *window],
        ],
        [[21, 23, 24, 25, *window], [15, 16, 17, 18, *window]],
    ]


def test_the_authors_code_keeps_the_same_but_for_the_remainder() -> None:
    """Golden: capacity 13, so 5 are free, and 5 layers, on random_row(44, seed=2, heads=2): 18, 16, 14, 12, 10.

    Its step of (10 - 0) // 4 = 2 leaves the last layer 2 instead of 0, so its total is 70 where the budget is 65.
    """
    found = counts(SMALL, 44, 13, 5)
    assert found == [18, 15, 13, 11, 8] and sum(found) == 65
    assert all(ours <= theirs for ours, theirs in zip(found, [18, 16, 14, 12, 10], strict=True))


def test_prompts_below_twice_the_budget_get_even_shares_as_in_the_authors_code() -> None:
    """Golden: the same code on random_row(34, seed=0, heads=2) with capacity 28: 28 at each layer.

    Its rule: where the prompt is shorter than 2c, here 40, every layer keeps the same.
    """
    assert counts(SMALL, 34, 28, 3) == [28, 28, 28]
