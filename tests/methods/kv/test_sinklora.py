"""SinkLoRA's cache: sinks, heavy hitters and recent tokens."""

import pytest
import torch

from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.sinklora import SinkLoRA
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
    """One channel, every query 1, keys ln 1, 1, 3, 1, 2, 1: attention is in proportion to 1, 1, 3, 1, 2, 1.

    Row q sums to 1, 2, 5, 6, 8, 9. Column 2 gets 3/5 + 3/6 + 3/8 + 3/9 = 1.81, column 1 gets 1/2 + 1/5 + 1/6 + 1/8 +
    1/9 = 1.10, column 4 gets 2/8 + 2/9 = 0.47, column 3 less. With one sink, four kept leave three, of which one and a
    half, that is one, is recent: 0, 5 and of the others the two heaviest, 1 and 2.
    """
    keys = torch.tensor([[[1.0], [1], [3], [1], [2], [1]]]).log()
    method = SinkLoRA(sinks=1)
    tokens = place(method, Row(torch.ones(1, 6, 1), keys, keys))
    torch.testing.assert_close(float(method.score(tokens)[0, 0, 2]), 3 / 5 + 3 / 6 + 3 / 8 + 3 / 9)
    assert kept(tokens, decide(method, 4, tokens)) == [[0, 1, 2, 5]]
    assert kept(tokens, decide(method, 3, tokens)) == [[0, 2, 5]]


@pytest.mark.parametrize(("sinks", "recent"), [(4, 0.5), (1, 0.0), (3, 0.9)])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, sinks: int, recent: float) -> None:
    row, count, method = random_row(n), -(-n // 2), SinkLoRA(sinks, recent)
    tokens, expected = place(method, row), naive.h2o(row.query, row.keys)
    expected[:, :sinks] = torch.inf
    agree(method.score(tokens)[0], expected)
    expected[:, n - int(max(count - sinks, 0) * recent) :] = torch.inf
    assert kept(tokens, decide(method, 0.5, tokens)) == [naive.best(head, count) for head in expected]


@pytest.mark.parametrize("keep", [0.1, 0.5, 12])
def test_without_sinks_it_is_h2o(keep: float | int) -> None:
    row, one, other = random_row(60), Cache(SinkLoRA(sinks=0), keep), Cache(H2O(), keep)
    for start, end in [(0, 50), *((i, i + 1) for i in range(50, 60))]:
        one.forward(row.part(start, end))
        other.forward(row.part(start, end))
        assert torch.equal(one.positions, other.positions)


def test_sinks_stay_whatever_they_receive() -> None:
    """The first four are the lightest of all, and stay through every step."""
    row, cache = random_row(60), Cache(SinkLoRA(), 12)
    row = Row(row.query.abs(), torch.cat([-row.keys[:, :4].abs() * 9, row.keys[:, 4:]], 1), row.values)
    for start, end in [(0, 50), *((i, i + 1) for i in range(50, 60))]:
        cache.forward(row.part(start, end))
        for head in cache.positions.tolist():
            assert head[:4] == [0, 1, 2, 3] and head[-4:] == list(range(end - 4, end))


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(SinkLoRA(), 0.3)
    same_alone_and_padded(SinkLoRA(), 0.5, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(SinkLoRA(), 0.3)


def test_a_budget_below_the_sinks_keeps_the_first_of_them() -> None:
    tokens = place(SinkLoRA(), random_row(30))
    assert kept(tokens, decide(SinkLoRA(), 3, tokens)) == [[0, 1, 2]] * 2
