"""Uniform: evenly spaced tokens."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fewer.methods.any.uniform import Uniform
from fewer.types import Tokens
from tests.methods.kv.build import SIZES, Cache, decide, kept, place, random_row, same_alone_and_padded, same_in_chunks


@pytest.mark.parametrize(
    ("n", "count", "expected"),
    [
        (10, 4, [0, 3, 6, 9]),
        (10, 3, [0, 5, 9]),  # 4.5 rounds up
        (10, 2, [0, 9]),
        (10, 9, [0, 1, 2, 3, 5, 6, 7, 8, 9]),
        (2, 2, [0, 1]),
    ],
)
def test_worked_examples(n: int, count: int, expected: list[int]) -> None:
    """c tokens of n stand (n - 1) / (c - 1) apart: of ten, four 3 apart, three 4.5 and nine 9 / 8."""
    tokens = place(Uniform(), random_row(n))
    assert kept(tokens, decide(Uniform(), count, tokens)) == [expected] * 2


def test_a_single_token_is_the_last() -> None:
    tokens = place(Uniform(), random_row(30))
    assert kept(tokens, decide(Uniform(), 0.01, tokens)) == [[29]] * 2


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.25, 0.5, 0.77, 0.99, 1.0, 2, 12])
@pytest.mark.parametrize("n", SIZES)
def test_gaps_differ_by_one_at_most(n: int, keep: float | int) -> None:
    tokens = place(Uniform(), random_row(n))
    for head in kept(tokens, decide(Uniform(), keep, tokens)):
        gaps = {b - a for a, b in pairwise(head)}
        assert head[-1] == n - 1 and (len(head) < 2 or head[0] == 0)
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(Uniform(), 0.3)
    same_alone_and_padded(Uniform(), 0.3, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(Uniform(), 0.3)


def test_nothing_of_the_text_is_looked_at() -> None:
    one, other = (place(Uniform(), random_row(63, seed=seed)) for seed in (1, 2))
    assert torch.equal(decide(Uniform(), 0.3, one).slot, decide(Uniform(), 0.3, other).slot)
    assert Uniform().needs == frozenset()


def test_protected_tokens_stay_and_the_others_are_even() -> None:
    """Of 20 with 3, 4 and 5 protected and 8 kept, 5 others are even: 0, 4.75, 9.5, 14.25 and 19, where 5 is taken.

    Nearest to 4.75, rounded to 5, among the others is 6, or 2 at a greater distance; 9.5 rounds to 10.
    """
    tokens = place(Uniform(), random_row(20), protect=[3, 4, 5])
    assert kept(tokens, decide(Uniform(), 8, tokens)) == [[0, 3, 4, 5, 6, 10, 14, 19]] * 2


def nearest(held: list[int], seen: int, count: int) -> list[int]:
    """One after the other: the free token nearest to each place, of equally near ones the later, leaving enough."""
    out: list[int] = []
    for i in range(count):
        ideal = seen - 1 if count == 1 else int(i * (seen - 1) / (count - 1) + 0.5)
        low = held.index(out[-1]) + 1 if out else 0
        open_ = held[low : len(held) - (count - 1 - i)]
        out.append(min(open_, key=lambda p: (abs(p - ideal), -p)))
    return out


@pytest.mark.parametrize("keep", [1 / 8, 5, 13])
def test_a_cache_that_is_compressed_again_stays_even(keep: float | int) -> None:
    """50 tokens, then 1, then 20 and 1 at a time: the token nearest to each even place, of those still there."""
    row, cache, held = random_row(90), Cache(Uniform(), keep), []
    for start, end in [(0, 50), (50, 51), (51, 71), *((i, i + 1) for i in range(71, 90))]:
        cache.forward(row.part(start, end))
        held += range(start, end)
        count = min(len(held), keep if isinstance(keep, int) else -(-end // 8))
        held = nearest(held, end, count)
        assert cache.positions.tolist() == [held] * 2
    assert held[0] == 0 and held[-1] == 89


def test_heads_that_hold_different_numbers_are_even_for_themselves() -> None:
    rows = [random_row(n, heads=1, kv_heads=1) for n in (60, 17)]
    batch = place(Uniform(), rows)
    flipped = {name: getattr(batch, name).transpose(0, 1) for name in ("features", "positions", "padding", "protected")}
    tokens: Tokens = replace(batch, **flipped, values=None, seen=batch.seen[:1])
    assert kept(tokens, decide(Uniform(), 6, tokens)) == [[0, 12, 24, 35, 47, 59], [0, 12, 13, 14, 15, 16]]
