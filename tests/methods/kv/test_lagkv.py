"""LagKV: tokens rated by the partition that follows theirs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.lagkv import LagKV
from fewer.types import MissingSignal, Tokens
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
    """Partitions of two, no sinks, keys and values alike, two channels: the spread of (a, b) goes with |a - b|.

    Tokens 2 and 3 are (0, 0) and (1, 2): lows (0, 0), widths (1, 2). By them token 0, (3, 2), becomes (3, 1) and token
    1, (2, 2), becomes (2, 1): 0 stands out more, ranks 1 and 0. Tokens 4 and 5 are (0, 0) and (2, 1): 2 becomes (0, 0)
    and 3 becomes (1/2, 2), ranks 0 and 1. The last partition stays. Of equals the later stays: three kept are 3, 4, 5.
    """
    x = torch.tensor([[[3.0, 2], [2, 2], [0, 0], [1, 2], [0, 0], [2, 1]]])
    method = LagKV(lag=2, sinks=0)
    tokens = place(method, Row(x, x, x))
    assert method.score(tokens).tolist() == [[[0.5, 0, 0, 0.5, 1, 1]]]
    assert kept(tokens, decide(method, 3, tokens)) == [[3, 4, 5]]
    assert kept(tokens, decide(method, 4, tokens)) == [[0, 3, 4, 5]]


def reference(keys: Tensor, values: Tensor, lag: int, sinks: int) -> Tensor:
    """The formula, token by token and channel by channel; +inf for the sinks."""
    h, n, _ = keys.shape
    out = torch.ones(h, n, dtype=torch.float64)
    out[:, :sinks] = torch.inf
    if n < sinks + 2 * lag:
        for j in range(sinks, n):
            out[:, j] = (j - sinks) / (n - sinks)
        return out
    for head in range(h):
        for start in range(sinks, n - 2 * lag + 1, lag):
            shares = torch.zeros(lag, dtype=torch.float64)
            for part in (keys[head].double(), values[head].double()):
                after = part[start + lag : start + 2 * lag]
                spreads = []
                for j in range(start, start + lag):
                    x = []
                    for c, number in enumerate(part[j].tolist()):
                        low, high = float(after[:, c].min()), float(after[:, c].max())
                        x.append((number - low) / (high - low))
                    mean = sum(x) / len(x)
                    spreads.append((sum((y - mean) ** 2 for y in x) / (len(x) - 1)) ** 0.5)
                shares += torch.softmax(torch.tensor(spreads, dtype=torch.float64), 0)
            for place_, j in enumerate(sorted(range(lag), key=lambda i: float(shares[i]))):
                out[head, start + j] = place_ / lag
    return out


@pytest.mark.parametrize(("lag", "sinks"), [(8, 4), (5, 0), (30, 2), (128, 4)])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, lag: int, sinks: int) -> None:
    row, method = random_row(n), LagKV(lag, sinks)
    tokens, expected = place(method, row), reference(row.keys, row.values, lag, sinks)
    agree(method.score(tokens)[0], expected)
    assert kept(tokens, decide(method, 0.7, tokens)) == [naive.best(head, -(-n * 7 // 10)) for head in expected]


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(LagKV(8), 0.5)
    same_alone_and_padded(LagKV(8), 0.5, lengths=(10, 20, 41), filler=torch.nan)
    same_in_chunks(LagKV(8), 0.5)


def test_heads_that_hold_different_numbers_are_cut_for_themselves() -> None:
    """60 tokens at one head, 17 at the other, as an earlier compression may have left them."""
    method, rows = LagKV(8), [random_row(n, seed=n, heads=1, kv_heads=1) for n in (60, 17)]
    batch = place(method, rows)
    uneven = replace(
        batch,
        **{name: getattr(batch, name).transpose(0, 1) for name in ("features", "positions", "padding", "protected")},
        values=None if batch.values is None else batch.values.transpose(0, 1),
        seen=batch.seen[:1],
    )
    scores = method.score(uneven)[0]
    for head, row in enumerate(rows):
        agree(scores[head, -len(row) :], reference(row.keys, row.values, 8, 4)[0])


def test_a_cache_is_cut_anew_each_time() -> None:
    method, row = LagKV(6, sinks=2), random_row(50)
    cache = Cache(method, 30)
    cache.forward(row.part(0, 40))
    held = torch.cat([cache.positions, torch.arange(40, 50).expand(2, 10)], 1)
    keys, values = (part.gather(1, held.unsqueeze(-1).expand(-1, -1, 8)) for part in (row.keys, row.values))
    cache.forward(row.part(40, 50))
    expected = reference(keys, values, 6, 2)
    assert cache.positions.tolist() == [held[h, naive.best(expected[h], 30)].tolist() for h in range(2)]


def test_a_budget_below_sinks_and_tail_keeps_sinks_and_the_latest() -> None:
    tokens = place(LagKV(8), random_row(41))
    assert kept(tokens, decide(LagKV(8), 7, tokens)) == [[0, 1, 2, 3, 38, 39, 40]] * 2
    short = place(LagKV(), random_row(41))
    assert kept(short, decide(LagKV(), 7, short)) == [[0, 1, 2, 3, 38, 39, 40]] * 2


def test_constant_channels_are_numbers_too() -> None:
    """A channel that is zero everywhere divides by nothing; with lag 1 every channel is constant over a partition."""
    row = random_row(41)
    flat = Row(row.query, row.keys * (torch.arange(8) > 0), row.values)
    for method in (LagKV(8), LagKV(1)):
        scores = method.score(place(method, flat))
        assert not bool(scores.isnan().any())


def test_tokens_without_values_are_refused() -> None:
    tokens: Tokens = replace(place(LagKV(), random_row(9)), values=None)
    with pytest.raises(MissingSignal, match="no values here"):
        LagKV().score(tokens)


def test_the_authors_code_gives_the_same_ranks() -> None:
    """Golden: LagKVPress(n_sink=4, lag_size=8).score (kvpress 0.5.5, the press is by the paper's first author).

    On random_row(41, seed=3): four partitions and one token after the 4 sinks; eight times the scores of the first
    three, the others are 1. Without cross_scoring, which that class has as an experiment.
    """
    theirs = [
        [6, 7, 5, 2, 3, 4, 1, 0, 4, 1, 3, 5, 6, 2, 7, 0, 3, 2, 7, 1, 0, 5, 4, 6],
        [6, 0, 2, 1, 5, 4, 7, 3, 5, 4, 6, 7, 2, 0, 1, 3, 3, 6, 7, 1, 2, 5, 4, 0],
    ]
    method = LagKV(8)
    scores = method.score(place(method, random_row(41, seed=3)))[0]
    assert (scores[:, 4:28] * 8).tolist() == theirs and bool((scores[:, 28:] == 1).all())
