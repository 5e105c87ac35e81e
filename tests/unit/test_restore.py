"""Ways back to the original length."""

import pytest
import torch

from fewer.restore import RESTORERS, restore
from fewer.types import Plan, UnknownName


def uneven() -> Plan:
    """Head 0 keeps tokens 0 and 2 and folds 1 into 0; head 1 keeps token 1 alone."""
    return Plan(
        slot=torch.tensor([[[0, 0, 1], [-1, 0, -1]]]),
        weight=torch.tensor([[[0.5, 0.5, 1.0], [0.0, 1.0, 0.0]]]),
        survivors=torch.tensor([[[0, 2], [1, -1]]]),
    )


def test_copy_gives_every_member_its_slot() -> None:
    y = torch.tensor([[[[4.0], [7]], [[9], [0]]]])
    assert restore(uneven(), y)[0, ..., 0].tolist() == [[4, 4, 7], [0, 9, 0]]
    assert torch.equal(uneven().restore(y), restore(uneven(), y, "copy"))


def test_zero_gives_survivors_alone() -> None:
    y = torch.tensor([[[[4.0], [7]], [[9], [5]]]])
    assert restore(uneven(), y, "zero")[0, ..., 0].tolist() == [[4, 0, 7], [0, 9, 0]]


def test_the_two_are_the_same_where_nothing_is_merged() -> None:
    plan = Plan.keep(torch.rand(2, 3, 9) > 0.4)
    y = plan.apply(torch.randn(2, 3, 9, 4))
    assert torch.equal(plan.restore(y, "copy"), plan.restore(y, "zero"))


@pytest.mark.parametrize("how", RESTORERS)
def test_both_keep_the_dtype_and_leave_what_they_are_given(how: str) -> None:
    y = torch.randn(1, 2, 2, 3).to(torch.bfloat16)
    before = y.clone()
    out = restore(uneven(), y, how)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 2, 3, 3) and torch.equal(y, before)


@pytest.mark.parametrize("how", RESTORERS)
def test_applying_after_restoring_survivors(how: str) -> None:
    """Picking survivors out of what was restored gives the slots back, in both ways."""
    y = torch.tensor([[[[4.0], [7]], [[9], [0]]]])
    assert torch.equal(uneven().pick(restore(uneven(), y, how)), y)


def test_an_unknown_way_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"restore\(how='mean'\): known ways are copy, zero"):
        restore(uneven(), torch.zeros(1, 2, 2, 1), "mean")
