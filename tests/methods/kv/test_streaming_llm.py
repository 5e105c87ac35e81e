"""StreamingLLM: sinks and the recent window, and positions counted inside the cache."""

import pytest
import torch

from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.signals import Rotation
from tests.methods.kv.build import (
    SIZES,
    Cache,
    HalfRotary,
    Row,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
)


def test_worked_example() -> None:
    """Ten tokens, two sinks, five kept: 0 and 1, and the last three, 7, 8, 9.

    The next query is token 10. Inside the cache the five count 0 to 4 and the query is 5, so its distances are
    5, 4, 3, 2, 1. From position 10 these are the positions 5, 6, 7, 8, 9: the recent ones stay where they are, the
    sinks move forward.
    """
    method = StreamingLLM(sinks=2)
    tokens = place(method, Row(*(torch.zeros(1, 10, 2) for _ in range(3))))
    plan = decide(method, 5, tokens)
    assert kept(tokens, plan) == [[0, 1, 7, 8, 9]]
    assert plan.moved is not None and plan.moved.tolist() == [[[5, 6, 7, 8, 9]]]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_agrees_with_the_text(n: int, sinks: int) -> None:
    count = -(-n * 6 // 10)
    tokens = place(StreamingLLM(sinks), random_row(n))
    plan = decide(StreamingLLM(sinks), 0.6, tokens)
    expected = list(range(n)) if count == n else [*range(sinks), *range(n - (count - sinks), n)]
    assert kept(tokens, plan) == [expected] * 2
    assert plan.moved is not None and plan.moved.tolist() == [[list(range(n - count, n))] * 2]


def test_padding_counts_for_nothing() -> None:
    method = StreamingLLM(sinks=2)
    same_alone_and_padded(method, 0.5)
    rows = [random_row(n) for n in (7, 20)]
    plan = decide(method, 0.5, place(method, rows))
    alone = decide(method, 0.5, place(method, rows[0]))
    assert plan.moved is not None and alone.moved is not None
    assert torch.equal(plan.moved[0, :, :4], alone.moved[0])


def test_the_next_query_sees_the_positions_inside_the_cache() -> None:
    """Moved keys give the logits of the published code, which rotates keys to 0 to 7 and the query to 8."""
    rotary, method, n, count = HalfRotary(8), StreamingLLM(), 30, 8
    plain, query = torch.randn(1, 2, n, 8), torch.randn(1, 2, 1, 8)
    rotated = rotary.turn(plain, torch.arange(n)[None])
    tokens = place(method, Row(rotated[0], rotated[0], plain[0]))
    plan = decide(method, count, tokens)
    assert plan.moved is not None
    moved = rotary.turn(plan.pick(tokens.features), plan.moved - plan.survivors)
    ours = rotary.turn(query, torch.tensor([[n]])) @ moved.transpose(-1, -2)
    inside = rotary.turn(plan.pick(plain), torch.arange(count)[None])
    published = rotary.turn(query, torch.tensor([[count]])) @ inside.transpose(-1, -2)
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-4)


def test_original_positions_move_nothing_and_need_nothing() -> None:
    method = StreamingLLM(positions="original")
    assert method.needs == frozenset() and StreamingLLM().needs == {Rotation()}
    assert decide(method, 8, place(method, random_row(30))).moved is None


def test_the_window_slides_token_after_token() -> None:
    """As StartRecentKVCache(start_size=4, recent_size=8) of mit-han-lab/streaming-llm (2e50426) on 20 + 5 tokens."""
    row, cache = random_row(25), Cache(StreamingLLM(), 12)
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 25))]:
        plan = cache.forward(row.part(start, end))
        assert plan.moved is not None and plan.moved[0, 0].tolist() == list(range(end - 12, end))
    assert cache.positions.tolist() == [[0, 1, 2, 3, *range(17, 25)]] * 2


def test_a_budget_below_the_sinks_keeps_the_first_of_them() -> None:
    tokens = place(StreamingLLM(sinks=4), random_row(30))
    plan = decide(StreamingLLM(sinks=4), 3, tokens)
    assert plan.counts.tolist() == [[3, 3]]
    assert kept(tokens, plan) == [[0, 1, 2]] * 2
