"""Who goes first where a budget does not hold all that must stay: what is no sink, from the window's start on; then
sinks, from the last to the first."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.allocate.across_heads import across_heads
from fewer.reduce.select import top_k
from fewer.score.position import FORCED, latest, must_stay, sinks_stay
from fewer.types import Allocation, Tokens


def row(n: int, missing: int = 0) -> Tokens:
    """One head of n tokens behind some padding."""
    positions = (torch.arange(n + missing) - missing).clamp(min=-1).view(1, 1, -1)
    return Tokens(
        features=torch.zeros(1, 1, n + missing, 2),
        positions=positions,
        padding=positions < 0,
        protected=positions < -1,
        seen=torch.tensor([n]),
    )


def kept(scores: torch.Tensor, count: int) -> list[int]:
    return top_k(scores, Allocation(torch.tensor([[count]]))).survivors[0, 0].tolist()


def test_worked_example() -> None:
    """Ten tokens, three sinks, a window of two, and a score as good as can be at token 5."""
    tokens, scores = row(10), torch.zeros(1, 1, 10)
    scores[0, 0, 5] = 1e38
    stays = sinks_stay(must_stay(scores, latest(tokens, 2)), tokens, 3)
    order = [0, 1, 2, 9, 8, 5]
    assert [kept(stays, count) for count in range(7)] == [sorted(order[:count]) for count in range(7)]
    assert torch.equal(scores, torch.tensor([0, 0, 0, 0, 0, 1e38, 0, 0, 0, 0]).view(1, 1, -1)), "nothing is written to"


def test_a_sink_inside_the_window_is_a_sink() -> None:
    tokens = row(4)
    one = sinks_stay(must_stay(torch.zeros(1, 1, 4), latest(tokens, 3)), tokens, 3)
    other = must_stay(sinks_stay(torch.zeros(1, 1, 4), tokens, 3), latest(tokens, 3))
    assert torch.equal(one, other) and [kept(one, count) for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_all_that_must_stay_is_known_by_its_score() -> None:
    """However many sinks there are: above every score, in an order without ties, and below what is protected."""
    n = 2**18
    tokens = row(n, missing=3)
    scores = sinks_stay(torch.full((1, 1, n + 3), 1e38), tokens, n)[0, 0]
    assert bool((scores[3:] >= FORCED).all()) and bool(scores.isfinite().all())
    assert bool((scores[3:-1] > scores[4:]).all()) and bool((scores[:3] == 1e38).all()), "padding is no sink"
    protected = torch.tensor([[[0.0, torch.inf, 0.0]]])
    assert sinks_stay(protected, row(3), 2)[0, 0, 1] == torch.inf


def test_sinks_are_no_contest_between_heads() -> None:
    """Two heads with two sinks each, of which head 1 has all the good scores: two of the four that are contested."""
    one = row(6)
    tokens = Tokens(
        features=one.features.expand(1, 2, 6, 2), positions=one.positions.expand(1, 2, 6), seen=one.seen,
        padding=one.padding.expand(1, 2, 6), protected=one.protected.expand(1, 2, 6),
    )  # fmt: skip
    scores = sinks_stay(torch.tensor([[[0.0] * 6, [0, 0, 9, 9, 0, 0]]]), tokens, 2)
    assert across_heads(tokens, scores, Allocation(torch.tensor([[3, 3]])), 0.0).counts.tolist() == [[2, 4]]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_budget_that_holds_what_must_stay_knows_no_order_in_it(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 20))
    tokens = row(n)
    scores = torch.tensor([[data.draw(st.lists(st.integers(-3, 3).map(float), min_size=n, max_size=n))]])
    sinks, window = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    must = (tokens.positions < sinks) | latest(tokens, window)
    stays = sinks_stay(must_stay(scores, latest(tokens, window)), tokens, sinks)
    for count in range(int(must.sum()), n + 1):
        assert kept(stays, count) == kept(torch.where(must, torch.inf, scores), count)
