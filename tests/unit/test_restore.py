"""Ways back to the original length."""

import math

import pytest
import torch

from fewer.restorers import NEEDS_BASE, RESTORERS, restore
from fewer.types import FewerError, Plan, Transform, UnknownName


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
def test_all_keep_the_dtype_and_leave_what_they_are_given(how: str) -> None:
    y, base = torch.randn(1, 2, 2, 3).to(torch.bfloat16), torch.randn(1, 2, 3, 3).to(torch.bfloat16)
    before, was = y.clone(), base.clone()
    out = restore(uneven(), y, how, base)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 2, 3, 3)
    assert torch.equal(y, before) and torch.equal(base, was)


@pytest.mark.parametrize("how", ["copy", "zero", "stale"])
def test_survivors_get_their_slots(how: str) -> None:
    """Picking survivors out of what was restored gives the slots back."""
    y = torch.tensor([[[[4.0], [7]], [[9], [0]]]])
    assert torch.equal(uneven().pick(restore(uneven(), y, how, torch.zeros(1, 2, 3, 1))), y)


# ---- the laws of merging: uniform and size-weighted means, and what inverts them


def merging(n: int, keep: int, sizes: torch.Tensor, seed: int = 0) -> Plan:
    """Everybody joins one of `keep` survivors; slots are means weighted by `sizes` `(1, n)`."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(n, generator=draw)[None, :keep]
    plan = Plan.keep(torch.zeros(1, n, dtype=torch.bool).scatter(1, chosen, True))
    slot = torch.where(plan.slot >= 0, plan.slot, torch.randint(0, keep, (1, n), generator=draw))
    total = torch.zeros(1, keep).scatter_add(1, slot, sizes)
    return Plan(slot, sizes / total.gather(1, slot), plan.survivors, mass=total)


SIZES = torch.tensor([[1.0, 3, 2, 1, 1, 5, 2, 4]])


@pytest.mark.parametrize("sizes", [torch.ones(1, 8), SIZES])
@pytest.mark.parametrize("how", ["copy", "pinv"])
def test_merging_again_gives_the_slots_back(how: str, sizes: torch.Tensor) -> None:
    """W S^T = I and W W^+ = I."""
    plan, y = merging(8, 3, sizes), torch.randn(1, 3, 4)
    torch.testing.assert_close(plan.apply(restore(plan, y, how)), y)


def test_copy_is_the_pseudo_inverse_of_a_plain_mean() -> None:
    plan, y = merging(8, 3, torch.ones(1, 8)), torch.randn(1, 3, 4)
    torch.testing.assert_close(restore(plan, y, "copy"), restore(plan, y, "pinv"))


def test_copy_is_not_that_of_a_weighted_mean_but_is_in_its_measure() -> None:
    """Of all that merges to the slots, pinv is the smallest; copy is, where tokens count by their sizes."""
    plan, y = merging(8, 3, SIZES), torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3))
    copied, inverted = restore(plan, y, "copy"), restore(plan, y, "pinv")
    assert not torch.allclose(copied, inverted, atol=1e-2)
    assert inverted.square().sum() < copied.square().sum()
    weight = SIZES.unsqueeze(-1)
    assert (weight * copied.square()).sum() < (weight * inverted.square()).sum()


@pytest.mark.parametrize("sizes", [torch.ones(1, 8), SIZES])
def test_pinv_is_the_pseudo_inverse(sizes: torch.Tensor) -> None:
    plan, y = merging(8, 3, sizes), torch.randn(1, 3, 4)
    torch.testing.assert_close(restore(plan, y, "pinv"), torch.linalg.pinv(Transform.of(plan).matrix) @ y)


def test_pinv_by_hand() -> None:
    """A slot of weights 1/4 and 3/4 is worth 5: of all (a, b) with a/4 + 3b/4 = 5 the shortest is (2, 6)."""
    plan = Plan(torch.tensor([[0, 0, -1]]), torch.tensor([[0.25, 0.75, 0]]), torch.tensor([[0]]))
    torch.testing.assert_close(restore(plan, torch.tensor([[[5.0]]]), "pinv").flatten(), torch.tensor([2.0, 6, 0]))


def test_merging_and_copying_is_a_projection() -> None:
    plan, x = merging(8, 3, SIZES), torch.randn(1, 8, 4)
    once = plan.restore(plan.apply(x))
    torch.testing.assert_close(plan.restore(plan.apply(once)), once)


# ---- ways that need what was there before


def test_delta_adds_what_the_slot_has_gained() -> None:
    """Tokens 2 and 4 were merged to 3 and their slot is 10 now: both gain 7. The dropped token stays as it was."""
    base = torch.tensor([[[[2.0], [4], [9]], [[1], [5], [8]]]])
    y = torch.tensor([[[[10.0], [9.5]], [[4], [0]]]])
    assert restore(uneven(), y, "delta", base).flatten().tolist() == [9, 11, 9.5, 1, 4, 8]


def test_delta_of_nothing_gained_is_what_was() -> None:
    plan, x = merging(8, 3, SIZES), torch.randn(1, 8, 4)
    torch.testing.assert_close(restore(plan, plan.apply(x), "delta", x), x)
    merged = plan.apply(x) + 1
    torch.testing.assert_close(plan.apply(restore(plan, merged, "delta", x)), merged)


def test_stale_leaves_all_others_as_they_were() -> None:
    base = torch.tensor([[[[2.0], [4], [9]], [[1], [5], [8]]]])
    y = torch.tensor([[[[10.0], [20]], [[30], [77]]]])
    assert restore(uneven(), y, "stale", base).flatten().tolist() == [10, 4, 20, 1, 30, 8]


def test_kernel_by_hand() -> None:
    """Tokens at 0, 10 and 20, the first two merged at 5: squared distances to 5 and 20 are 25 and 400, 25 and 100, 225
    and 0. Weights are exp(-0.01 x those), shared out: the first token gets 1 / (1 + exp(-3.75)) of the first slot."""
    plan = Plan(torch.tensor([[0, 0, 1]]), torch.tensor([[0.5, 0.5, 1]]), torch.tensor([[0, 2]]))
    base, y = torch.tensor([[[0.0], [10], [20]]]), torch.tensor([[[1.0], [0]]])
    expected = [1 / (1 + math.exp(-(b - a) / 100)) for a, b in ((25, 400), (25, 100), (225, 0))]
    torch.testing.assert_close(restore(plan, y, "kernel", base).flatten(), torch.tensor(expected))


def test_kernel_agrees_with_the_formula() -> None:
    """Loops over tokens: the 20 nearest of 25 slots, by exp(-0.01 x squared distance), adding up to one."""
    plan = merging(40, 25, torch.ones(1, 40), seed=2)
    base, y = 8 * torch.randn(1, 40, 3), torch.randn(1, 25, 3)
    slots, out = plan.apply(base), restore(plan, y, "kernel", base)
    for i in range(40):
        far = [float((base[0, i] - slots[0, k]).square().sum()) for k in range(25)]
        near = sorted(range(25), key=lambda k: far[k])[:20]
        weights = [math.exp(-0.01 * far[k]) for k in near]
        expected = sum(w * y[0, k] for w, k in zip(weights, near, strict=True)) / sum(weights)
        torch.testing.assert_close(out[0, i], expected, atol=1e-5, rtol=1e-5)


def test_kernel_is_the_authors_with_weights_that_add_up() -> None:
    """Golden: TokenReconstructionBlock(k=3, temperture=0.01) of segment_anything/modeling/hourglass_image_encoder.py
    (Expedit-LargeScale-Vision-Transformer/Expedit-SAM at 75a1c30) has weights whose squares add up to one. For a token
    at 0 and slots at 5, 10 and 20, times 1, 2 and 3, it gives 1.82181; for slots of ones 1.35227."""
    base = torch.tensor([[[0.0], [5], [10], [20]]])
    plan = Plan.keep(torch.tensor([[False, True, True, True]]))
    out = restore(plan, torch.tensor([[[1.0], [2], [3]]]), "kernel", base)
    assert out[0, 0].item() == pytest.approx(1.82181 / 1.35227, abs=1e-4)


def test_kernel_gives_back_what_is_the_same_everywhere() -> None:
    plan = merging(40, 25, torch.ones(1, 40))
    out = restore(plan, torch.full((1, 25, 2), 3.5), "kernel", torch.randn(1, 40, 2))
    torch.testing.assert_close(out, torch.full((1, 40, 2), 3.5))


def test_kernel_of_tokens_far_apart_is_copy() -> None:
    base = 1000 * torch.arange(8.0).view(1, 8, 1)
    plan = Plan.keep(torch.arange(8).unsqueeze(0) % 2 == 0)
    y = torch.randn(1, 4, 1)
    assert torch.equal(restore(plan, y, "kernel", base)[:, ::2], y)


def test_kernel_has_nothing_from_slots_that_do_not_exist() -> None:
    """Head 1 has a single slot: all its tokens get that, whatever stands in the second."""
    y = torch.tensor([[[[4.0], [8]], [[9], [1e9]]]])
    out = restore(uneven(), y, "kernel", torch.zeros(1, 2, 3, 1))
    assert out.flatten().tolist() == [6, 6, 6, 9, 9, 9]


def test_kernel_keeps_class_tokens_apart() -> None:
    """The class token lies on top of the patches, and neither takes from them nor gives to them."""
    plan = Plan(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1, 0.5, 0.5, 1]]), torch.tensor([[0, 1, 3]]))
    base, y = torch.zeros(1, 4, 1), torch.tensor([[[100.0], [2], [4]]])
    assert restore(plan, y, "kernel", base, prefix=1).flatten().tolist() == [100, 3, 3, 3]
    assert restore(plan, y, "kernel", base).flatten().tolist() == pytest.approx([106 / 3] * 4)


@pytest.mark.parametrize("how", NEEDS_BASE)
def test_what_was_there_before_must_be_given(how: str) -> None:
    with pytest.raises(FewerError, match=rf"how='{how}'\) needs the features the plan was made on: .*tape=True"):
        restore(uneven(), torch.zeros(1, 2, 2, 1), how)
    with pytest.raises(FewerError, match=rf"how='{how}'\) needs the features"):
        uneven().restore(torch.zeros(1, 2, 2, 1), how)


@pytest.mark.parametrize("how", NEEDS_BASE)
def test_what_was_there_before_must_be_as_wide(how: str) -> None:
    with pytest.raises(FewerError, match=rf"how='{how}'\) mixes .* 5 wide, .* 3 wide: .*'copy', 'zero' or 'pinv'"):
        restore(uneven(), torch.zeros(1, 2, 2, 5), how, torch.zeros(1, 2, 3, 3))


def test_an_unknown_way_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"restore\(how='mean'\): known ways are copy, zero"):
        restore(uneven(), torch.zeros(1, 2, 2, 1), "mean")
