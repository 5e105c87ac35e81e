"""H2O: the tokens that received most attention, and the recent ones."""

import pytest
import torch

from fewer.methods.kv.h2o import H2O
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


def test_worked_example() -> None:
    """One channel, every query 1, keys ln 1, 3, 1, 1: attention is in proportion to 1, 3, 1, 1.

    Rows: (1), (1, 3) / 4, (1, 3, 1) / 5, (1, 3, 1, 1) / 6. Column sums: 1 + 1/4 + 1/5 + 1/6 = 1.617,
    3/4 + 3/5 + 3/6 = 1.85, 1/5 + 1/6 = 0.367, 1/6 = 0.167. Of 2 kept, half is recent: token 3; the heaviest other is 1.
    Of 3, half rounds down to 1 recent, so the two heavy ones are 0 and 1.
    """
    keys = torch.tensor([[[1.0], [3], [1], [1]]]).log()
    tokens = place(H2O(), Row(torch.ones(1, 4, 1), keys, keys))
    expected = torch.tensor([[[1 + 1 / 4 + 1 / 5 + 1 / 6, 1.85, 1 / 5 + 1 / 6, 1 / 6]]])
    torch.testing.assert_close(H2O().score(tokens), expected)
    assert kept(tokens, decide(H2O(), 2, tokens)) == [[1, 3]]
    assert kept(tokens, decide(H2O(), 3, tokens)) == [[0, 1, 3]]


def reference(scores: torch.Tensor, count: int, recent: int) -> list[list[int]]:
    n = scores.shape[1]
    return [[*naive.best(head[: n - recent], count - recent), *range(n - recent, n)] for head in scores]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int) -> None:
    row, count = random_row(n, heads=heads), -(-n // 2)
    expected = naive.h2o(row.query, row.keys)
    for share in (0.0, 0.3, 0.5, 1.0):
        tokens = place(H2O(share), row)
        agree(H2O(share).score(tokens)[0], expected)
        assert kept(tokens, decide(H2O(share), 0.5, tokens)) == reference(expected, count, int(count * share))


def test_padding_receives_and_pays_nothing() -> None:
    same_alone_and_padded(H2O(), 0.3)


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(H2O(), 0.3, lengths=(10, 20), filler=torch.nan)


def test_chunks_change_nothing() -> None:
    same_in_chunks(H2O(), 0.3)


def test_tokens_that_were_evicted_take_their_scores_along() -> None:
    """Prefill 12, keep 6, then 3 more: the survivors' sums go on, the three new ones start with their own columns.

    By hand: what the observer holds at the end is the old sums of the survivors, plus a softmax of each new query over
    what was held then.
    """
    row, cache = random_row(15, heads=2), Cache(H2O(), 6)
    cache.forward(row.part(0, 12))
    columns = naive.h2o(row.query[:, :12], row.keys[:, :12])
    sums = [{p: float(columns[h, p]) for p in cache.positions[h].tolist()} for h in range(2)]
    for new in range(12, 15):
        for h in range(2):
            held = [*sums[h], new]
            weights = torch.softmax(row.keys[h, held].double() @ row.query[h, new].double() / 8**0.5, 0)
            sums[h] = {p: sums[h].get(p, 0.0) + float(w) for p, w in zip(held, weights, strict=True)}
            heavy = sorted(held[:-3], key=sums[h].__getitem__)[-3:]
            sums[h] = {p: sums[h][p] for p in sorted([*heavy, *held[-3:]])}
        cache.forward(row.part(new, new + 1))
    assert cache.positions.tolist() == [list(head) for head in sums]
    (observer,) = cache.observers.values()
    agree(observer.value()[0], torch.tensor([list(head.values()) for head in sums], dtype=torch.float64))


def test_protected_tokens_come_before_recent_ones() -> None:
    """Three protected tokens fit in a budget of four, so they stay, and one recent one with them."""
    tokens = place(H2O(), random_row(30), protect=[0, 1, 2])
    for head in kept(tokens, decide(H2O(), 4, tokens)):
        assert head[:3] == [0, 1, 2] and head[3] >= 28


def test_the_authors_code_keeps_the_same_token_after_token() -> None:
    """Golden: H2OKVCache_LayerWise (FMInference/H2O ac75c2a, utils_real_drop) with hh_size 4, recent_size 4.

    On random_row(30, seed=3, heads=2) with queries times 4; ten tokens at once, then one by one, each time with the
    softmax of the queries over what was held; kept indices after the first, the eleventh and the last call.
    """
    row, cache, seen = random_row(30, seed=3, heads=2), Cache(H2O(), 8), []
    row = Row(row.query * 4, row.keys, row.values)
    for start, end in [(0, 10), *((i, i + 1) for i in range(10, 30))]:
        cache.forward(row.part(start, end))
        seen.append(cache.positions.tolist())
    assert seen[0] == [[0, 1, 3, 4, 6, 7, 8, 9], [0, 1, 3, 4, 6, 7, 8, 9]]
    assert seen[10] == [[0, 1, 3, 4, 16, 17, 18, 19], [0, 3, 4, 13, 16, 17, 18, 19]]
    assert seen[-1] == [[0, 3, 4, 20, 26, 27, 28, 29], [0, 4, 13, 22, 26, 27, 28, 29]]
