"""ExpectedAttention: how much attention future queries will pay, from the moments of past ones."""

from dataclasses import replace

import pytest
import torch

from fewer.methods.kv.expected_attention import ExpectedAttention
from fewer.types import FewerError
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    HalfRotary,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)


def rotated(query: list[list[float]], keys: list[list[float]], norms: list[float]) -> Row:
    """Queries rotated by their own positions, keys all by the position of the next query, values of these norms."""
    rotary, n = HalfRotary(2), len(keys)
    turned = rotary.turn(torch.tensor([[query]]), torch.arange(n)[None])
    facing = rotary.turn(torch.tensor([[keys]]), torch.full((1, n), n))
    return Row(turned[0], facing[0], torch.tensor([[[norm, 0.0] for norm in norms]]))


def test_worked_example() -> None:
    """Three tokens, no sinks, one future position; unrotated queries are all (1, 0), so mu = (1, 0) and C = 0.

    The keys stand at the next query's angle, (ln w, 0) before that, with w = 1, 2, 5: z = ln w, and the softmax is
    1/8, 2/8, 5/8. Values of norm 8, 2, 1 make 1, 1/2, 5/8: tokens 0 and 2 stay. With eps = 1 the scores are
    9/8 * 8 = 9, 10/8 * 2 = 2.5, 13/8 = 1.625: tokens 0 and 1 stay.
    """
    keys = [[float(torch.tensor(w).log()), 0.0] for w in (1.0, 2, 5)]
    row = rotated([[1.0, 0.0]] * 3, keys, [8, 2, 1])
    for eps, scores, stay in ((0.0, [1, 0.5, 0.625], [0, 2]), (1.0, [9, 2.5, 1.625], [0, 1])):
        method = ExpectedAttention(future=1, sinks=0, eps=eps)
        tokens = place(method, row, scaling=1.0)
        agree(method.score(tokens)[0, 0], torch.tensor(scores))
        assert kept(tokens, decide(method, 2, tokens)) == [stay]


def test_worked_example_of_the_covariance() -> None:
    """Unrotated queries (2, 0) and (-2, 0): mu = 0, and C has the single entry 4.

    Keys (x, 0) at the next query's angle, times a scale of 1/2: z = 4 x^2 / (2 * 4) = x^2 / 2. With x = sqrt(2 ln 3)
    and 0 the weights are 3 and 1 of 4; values of norm 1 leave 3/4 and 1/4.
    """
    x = (2 * float(torch.tensor(3.0).log())) ** 0.5
    method = ExpectedAttention(future=1, sinks=0)
    tokens = place(method, rotated([[2.0, 0], [-2, 0]], [[x, 0], [0, 0]], [1, 1]), scaling=0.5)
    agree(method.score(tokens)[0, 0], torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize(("future", "sinks", "eps"), [(16, 4, 0.02), (1, 0, 0.0), (512, 2, 0.0)])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int, future: int, sinks: int, eps: float) -> None:
    method, row = ExpectedAttention(future, sinks, eps), random_row(n, heads=heads)
    tokens = place(method, row)
    expected = naive.expected_attention(
        row.query, row.keys, row.values, base=100.0, future=future, sinks=sinks, eps=eps
    )
    agree(method.score(tokens)[0], expected)
    count = -(-n * 7 // 10)
    assert kept(tokens, decide(method, 0.7, tokens)) == [naive.best(head, count) for head in expected]


def test_padding_counts_for_nothing() -> None:
    same_alone_and_padded(ExpectedAttention(future=16), 0.6)


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(ExpectedAttention(future=16), 0.6, lengths=(10, 20), filler=torch.nan)


def test_chunks_change_nothing() -> None:
    same_in_chunks(ExpectedAttention(future=16), 0.4)
    same_in_chunks(ExpectedAttention(future=16), 0.4, n=20, chunks=(1, 2, 3))


def test_sinks_stay_and_their_queries_do_not_count() -> None:
    """The first four queries may be anything."""
    row = random_row(63)
    wild = torch.cat([row.query[:, :4] * 100, row.query[:, 4:]], 1)
    method = ExpectedAttention(future=16)
    tokens, other = place(method, row), place(method, Row(wild, row.keys, row.values))
    agree(method.score(other), method.score(tokens))
    assert all(head[:4] == [0, 1, 2, 3] for head in kept(tokens, decide(method, 8, tokens)))


@pytest.mark.parametrize("n", [1, 4])
def test_a_prompt_of_sinks_alone_is_decided_on(n: int) -> None:
    tokens = place(ExpectedAttention(), random_row(n))
    assert decide(ExpectedAttention(), 0.5, tokens).counts.tolist() == [[-(-n // 2)] * 2]


def test_a_place_without_values_is_refused() -> None:
    tokens = replace(place(ExpectedAttention(), random_row(7)), values=None)
    with pytest.raises(FewerError, match="by their values"):
        ExpectedAttention().score(tokens)


@pytest.mark.parametrize(
    ("method", "scores", "stay"),
    [
        (
            ExpectedAttention(),
            [0.07777, 0.08342, 0.04632, 0.0544, 0.09719, 0.0686],
            [[0, 1, 2, 3, 8, 11, 19, 25, 36, 38], [0, 1, 2, 3, 11, 12, 16, 24, 25, 33]],
        ),
        (
            ExpectedAttention(future=16, eps=0.02),
            [0.15761, 0.13803, 0.07521, 0.08446, 0.22462, 0.12655],
            [[0, 1, 2, 3, 4, 8, 11, 19, 25, 38], [0, 1, 2, 3, 12, 14, 16, 24, 25, 33]],
        ),
    ],
    ids=["defaults", "eps"],
)
def test_the_authors_code_keeps_the_same(method: ExpectedAttention, scores: list[float], stay: list[list[int]]) -> None:
    """Golden: ExpectedAttentionPress.score of kvpress 0.5.5 (8bb29b9) on random_row(40, seed=0), its top 10 a head.

    Its module was a stand-in: queries already projected, a half-split rotary table of base 100. First numbers after the
    sinks, and the kept indices.
    """
    tokens = place(method, random_row(40, seed=0))
    torch.testing.assert_close(method.score(tokens)[0, 0, 4:10], torch.tensor(scores), atol=1e-5, rtol=0)
    assert kept(tokens, decide(method, 10, tokens)) == stay
