"""Scissorhands: counts of attention below the average, and budgets that rise with depth."""

import pytest
import torch
from torch import Tensor

from fewer.methods.kv import scissorhands
from fewer.methods.kv.pyramidkv import PyramidKV
from fewer.methods.kv.scissorhands import Scissorhands
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


def test_worked_example() -> None:
    """One channel, every query 1, keys ln 1, 3, 1, 2: attention is in proportion to 1, 3, 1, 2; all four queries count.

    Query 0 sees (1) against an average of 1: nobody is below. Query 1: (1, 3) / 4 against 1/2: token 0. Query 2:
    (1, 3, 1) / 5 against 1/3: tokens 0 and 2. Query 3: (1, 3, 1, 2) / 7 against 1/4: 0 and 2, 3 is above. Counts
    3, 0, 2, 0; with one recent token, 3 stays. Two kept: 1 and 3. Three: 2 as well.
    """
    keys = torch.tensor([[[1.0], [3], [1], [2]]]).log()
    method = Scissorhands(recent=1)
    tokens = place(method, Row(torch.ones(1, 4, 1), keys, keys))
    assert method.score(tokens)[0, 0, :3].tolist() == [-3, 0, -2] and float(method.score(tokens)[0, 0, 3]) > 1e38
    assert kept(tokens, decide(method, 2, tokens)) == [[1, 3]]
    assert kept(tokens, decide(method, 3, tokens)) == [[1, 2, 3]]


def test_exactly_the_average_is_not_below_it() -> None:
    """Keys that are all alike share evenly: every count is 0, and of equals the later ones stay."""
    row = Row(torch.randn(2, 9, 4), torch.zeros(1, 9, 4), torch.zeros(1, 9, 4))
    tokens = place(Scissorhands(recent=0), row)
    assert not bool(Scissorhands(recent=0).score(tokens).any())
    assert kept(tokens, decide(Scissorhands(recent=0), 3, tokens)) == [[6, 7, 8]]


def reference(query: Tensor, keys: Tensor, history: int, recent: int) -> Tensor:
    """Minus the counts, token by token and query by query; +inf for the recent tokens."""
    h, n, _ = keys.shape
    groups, weights = query.shape[0] // h, naive.attention(query, keys)
    out = torch.zeros(h, n, dtype=torch.float64)
    for head in range(query.shape[0]):
        for q in range(max(0, n - history), n):
            for j, weight in enumerate(weights[head, q, : q + 1].tolist()):
                out[head // groups, j] -= int(weight < 1 / (q + 1))
    out[:, max(0, n - recent) :] = torch.inf
    return out


@pytest.mark.parametrize(("history", "recent"), [(400, 10), (5, 2), (1, 0)])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, history: int, recent: int) -> None:
    row, method = random_row(n), Scissorhands(history, recent)
    tokens, expected = place(method, row), reference(row.query, row.keys, history, recent)
    agree(method.score(tokens)[0], expected)
    assert kept(tokens, decide(method, 0.4, tokens)) == [naive.best(head, -(-n * 4 // 10)) for head in expected]


@pytest.mark.parametrize("cells", [1, 700])
def test_blocks_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scissorhands, "BLOCK_CELLS", cells)
    row = random_row(23)
    agree(Scissorhands().score(place(Scissorhands(), row))[0], reference(row.query, row.keys, 400, 10))


def test_padding_and_chunks_change_nothing() -> None:
    for method in (Scissorhands(recent=3), Scissorhands(history=6, recent=3)):
        same_alone_and_padded(method, 0.3)
        same_alone_and_padded(method, 0.3, lengths=(10, 20), filler=torch.nan)
        same_in_chunks(method, 0.3)


def test_what_was_evicted_is_in_no_average() -> None:
    """30 tokens, 12 kept, 4 more: the last query sees what is held, and its average is over that."""
    method, row = Scissorhands(history=1, recent=2), random_row(34, heads=2)
    cache = Cache(method, 12)
    cache.forward(row.part(0, 30))
    held = [[*cache.positions[h].tolist(), *range(30, 34)] for h in range(2)]
    cache.forward(row.part(30, 34))
    for h in range(2):
        weights = torch.softmax(row.keys[h, held[h]].double() @ row.query[h, 33].double() / 8**0.5, 0)
        low = [-float(w < 1 / 16) for w in weights]
        low[-2:] = [torch.inf, torch.inf]
        assert cache.positions[h].tolist() == [held[h][i] for i in naive.best(low, 12)]


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.45, 0.6, 25])
def test_later_layers_keep_more_and_the_total_is_exact(keep: float | int, layers: int) -> None:
    method = Scissorhands(recent=4)
    counts = torch.stack(
        [
            decide(method, keep, place(method, [random_row(130), random_row(63)], site=Site(layer, layers))).counts
            for layer in range(layers)
        ]
    )  # (layers, 2, 2)
    assert bool((counts.diff(dim=0) >= 0).all()), "never fewer than the layer before"
    for index, n in enumerate((130, 63)):
        assert counts[:, index].sum().item() == 2 * layers * Budget.parse(keep).count(n)
        if layers > 1 and keep == 0.3:
            assert counts[0, index, 0] < counts[-1, index, 0]


def test_the_slope_is_pyramidkvs_backwards() -> None:
    """14 of 100 with 4 recent: 10 free, from 10 / 2 at the first of three layers to 15 at the last, and the 4 each."""
    ours, theirs = Scissorhands(recent=4, beta=2), PyramidKV(window=4, beta=2)
    counts = [
        [int(decide(m, 14, place(m, random_row(100), site=Site(layer, 3))).counts[0, 0]) for layer in range(3)]
        for m in (ours, theirs)
    ]
    assert counts == [[9, 14, 19], [19, 14, 9]]


def test_a_budget_below_the_recent_tokens_keeps_the_latest_of_them() -> None:
    tokens = place(Scissorhands(), random_row(30))
    assert kept(tokens, decide(Scissorhands(), 5, tokens)) == [[25, 26, 27, 28, 29]] * 2
