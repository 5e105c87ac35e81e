"""Full: nothing is dropped."""

import pytest
import torch

from fewer.methods.any.full import Full
from tests.methods.kv.build import SIZES, Row, decide, kept, place, random_row


def test_worked_example() -> None:
    """Three tokens, and a budget of a quarter: ceil(3 / 4) = 1 may stay by the budget, and all 3 do."""
    row = Row(torch.zeros(1, 3, 2), torch.tensor([[[1.0, 0], [5, 5], [0, 2]]]), torch.zeros(1, 3, 2))
    tokens = place(Full(), row)
    assert kept(tokens, decide(Full(), 0.25, tokens)) == [[0, 1, 2]]


@pytest.mark.parametrize("keep", [0.1, 2, 1.0])
def test_everything_real_stays_and_padding_goes(keep: float) -> None:
    tokens = place(Full(), [random_row(n) for n in SIZES])
    plan = decide(Full(), keep, tokens)
    for row, n in enumerate(SIZES):
        assert kept(tokens, plan, row) == [list(range(n))] * 2
    assert not bool((tokens.padding & (plan.slot >= 0)).any())


def test_the_plan_is_the_identity() -> None:
    tokens = place(Full(), random_row(63))
    plan = decide(Full(), 2, tokens)
    assert torch.equal(plan.apply(tokens.features), tokens.features)
    assert torch.equal(plan.pick(tokens.features), tokens.features)
