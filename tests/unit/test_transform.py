"""Transform: a decision as a matrix, with the verbs of a plan."""

import pytest
import torch

from fewer.errors import FewerError
from fewer.restorers import restore
from fewer.types import Plan, Transform


def soft() -> Transform:
    """Three tokens in two slots; the middle one goes half to each."""
    return Transform(
        torch.tensor([[[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]]), torch.tensor([[0, 2]]), torch.tensor([[1.5, 1.5]])
    )


def folded() -> Plan:
    """Row 0 keeps tokens 0 and 2 and folds 1 into 0, by the mean; row 1 keeps token 1 alone and drops the others."""
    return Plan(
        slot=torch.tensor([[0, 0, 1], [-1, 0, -1]]),
        weight=torch.tensor([[0.5, 0.5, 1.0], [0.0, 1.0, 0.0]]),
        survivors=torch.tensor([[0, 2], [1, -1]]),
        mass=torch.tensor([[2.0, 1.0], [1.0, 0.0]]),
    )


def random_plan(n: int, keep: int, seed: int, rows: int = 2) -> Plan:
    """Some tokens stay, the others join a random one of them or are dropped; slots are means."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, n, generator=draw).argsort(-1)
    plan = Plan.keep(torch.zeros(rows, n, dtype=torch.bool).scatter(1, order[:, :keep], True))
    joins = torch.randint(-1, keep, (rows, n), generator=draw)
    slot = torch.where(plan.slot >= 0, plan.slot, joins)
    size = torch.zeros(rows, keep).scatter_add(1, slot.clamp(min=0), (slot >= 0).float())
    weight = torch.where(slot >= 0, 1 / size.gather(1, slot.clamp(min=0)), 0)
    return Plan(slot, weight, plan.survivors, mass=size)


def test_apply_mixes_by_hand() -> None:
    """2/3 of 3 and 1/3 of 6 is 4; 1/3 of 6 and 2/3 of 12 is 10."""
    x = torch.tensor([[[3.0], [6.0], [12.0]]])
    torch.testing.assert_close(soft().apply(x), torch.tensor([[[4.0], [10.0]]]))
    assert soft().pick(x).flatten().tolist() == [3, 12]
    assert soft().counts.tolist() == [2] and soft().folds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_apply_sums_in_float32_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    """The mean of 512 and 511 threes is 3.497..., which sums in half precision would not come near to."""
    x = torch.cat([torch.full((1, 1, 1), 512.0), torch.full((1, 1023, 1), 3.0)], 1).to(dtype)
    out = Transform(torch.full((1, 1, 1024), 1 / 1024), torch.zeros(1, 1, dtype=torch.long)).apply(x)
    assert out.dtype == dtype and out.item() == torch.tensor((512 + 3 * 1023) / 1024).to(dtype).item()


@pytest.mark.parametrize(("n", "keep"), [(3, 1), (9, 4), (20, 20)])
def test_a_plan_is_a_transform(n: int, keep: int) -> None:
    plan = random_plan(n, keep, seed=n)
    dense, x = Transform.of(plan), torch.randn(2, n, 5)
    torch.testing.assert_close(dense.apply(x), plan.apply(x))
    assert torch.equal(dense.pick(x), plan.pick(x)) and torch.equal(dense.counts, plan.counts)
    assert torch.equal(dense.assign, plan.assign)
    assert dense.mass is not None and plan.mass is not None and torch.equal(dense.mass, plan.mass)
    dense.check()


def test_a_plan_with_an_empty_slot_is_a_transform() -> None:
    """Row 1 has one slot; the second one's row of the matrix is zeros, as is what comes out of it."""
    dense = Transform.of(folded())
    assert dense.matrix.tolist() == [[[0.5, 0.5, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 0]]]
    x = torch.tensor([[[2.0], [4], [9]], [[2.0], [4], [9]]])
    assert dense.apply(x).flatten().tolist() == [3, 9, 4, 0] == folded().apply(x).flatten().tolist()
    dense.check()


def test_composing_by_hand() -> None:
    """The two slots of `soft` into their mean: half of each row is (1/3, 1/3, 1/3), as a mean of all would be."""
    both = soft().then(Plan(torch.tensor([[0, 0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0]])))
    torch.testing.assert_close(both.matrix, torch.full((1, 1, 3), 1 / 3))
    assert both.survivors.tolist() == [[0]]


@pytest.mark.parametrize("seed", range(3))
def test_composing_is_applying_in_turn(seed: int) -> None:
    """Plan then plan, plan then transform, transform then plan, transform then transform: all the same."""
    first, later, x = random_plan(12, 7, seed), random_plan(7, 3, seed + 10), torch.randn(2, 12, 4)
    expected = later.apply(first.apply(x))
    for one in (first, Transform.of(first)):
        for two in (later, Transform.of(later)):
            both = one.then(two)
            torch.testing.assert_close(both.apply(x), expected)
            assert torch.equal(both.survivors, first.then(later).survivors)
            assert torch.equal(both.assign, first.then(later).assign)
            assert both.mass is not None and later.mass is not None and torch.equal(both.mass, later.mass)


def test_composing_hands_masses_on() -> None:
    """What a pruning leaves counts for as much as it did before."""
    left = soft().then(Plan.keep(torch.tensor([[False, True]])))
    assert left.mass is not None and left.mass.tolist() == [[1.5]] and left.survivors.tolist() == [[2]]


def test_assign_is_the_slot_that_takes_most() -> None:
    """Token 0 is in slot 0 by a little, token 1 in slot 1 by far, and nobody takes any of token 2."""
    matrix = torch.tensor([[[0.6, 0.1, 0.0], [0.5, 0.9, 0.0]]])
    assert Transform(matrix, torch.tensor([[0, 1]])).assign.tolist() == [[0, 1, -1]]


def test_check_passes_what_is_right() -> None:
    soft().check()
    soft().check(torch.tensor([[False, False, False]]))
    Transform.of(folded()).check()


FAULTS = {
    "slots out of order": (torch.tensor([[[0.0, 0, 1], [1, 0, 0]]]), [[2, 0]], "not in the order of their tokens"),
    "one token, two slots": (torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), [[0, 0]], "not in the order of their tokens"),
    "a hole before a slot": (torch.tensor([[[0.0, 0, 0], [0, 1, 0]]]), [[-1, 1]], "not in the order of their tokens"),
    "a slot that is none": (torch.tensor([[[1.0, 0, 0], [0, 0.1, 0]]]), [[0, -1]], "fills a slot that does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_planted_faults(fault: str) -> None:
    matrix, survivors, message = FAULTS[fault]
    with pytest.raises(FewerError, match=message):
        Transform(matrix, torch.tensor(survivors)).check()


def test_check_finds_padding() -> None:
    with pytest.raises(FewerError, match="mixes padding in"):
        soft().check(torch.tensor([[False, False, True]]))


def test_copy_by_hand() -> None:
    """Each token takes its slots in the shares it went to them: the ends take one, the middle the mean."""
    y = torch.tensor([[[4.0], [10.0]]])
    torch.testing.assert_close(soft().restore(y).flatten(), torch.tensor([4.0, 7, 10]))


def test_pinv_by_hand() -> None:
    """Rows (2, 1, 0) / 3 and (0, 1, 2) / 3: of all x with (2a + b) / 3 = 4 and (b + 2c) / 3 = 10 the shortest.

    a = 6 - b/2 and c = 15 - b/2, so a^2 + b^2 + c^2 is least where -(6 - b/2) + 2b - (15 - b/2) = 0: b = 7.
    """
    out = soft().restore(torch.tensor([[[4.0], [10.0]]]), "pinv")
    torch.testing.assert_close(out.flatten(), torch.tensor([2.5, 7, 11.5]))


def test_pinv_comes_back_to_the_same_slots() -> None:
    matrix = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(0))
    mixed = Transform(matrix, torch.tensor([[0, 2, 5, 8]]).expand(2, -1))
    y = torch.randn(2, 4, 3)
    torch.testing.assert_close(mixed.apply(mixed.restore(y, "pinv")), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["copy", "zero", "pinv"])
def test_restoring_is_the_plans(how: str) -> None:
    plan, y = random_plan(11, 4, seed=5), torch.randn(2, 4, 3)
    torch.testing.assert_close(Transform.of(plan).restore(y, how), plan.restore(y, how))


@pytest.mark.parametrize("how", ["delta", "stale", "kernel"])
def test_restoring_on_features_is_the_plans(how: str) -> None:
    plan, y, base = random_plan(11, 4, seed=6), torch.randn(2, 4, 3), torch.randn(2, 11, 3)
    torch.testing.assert_close(restore(Transform.of(plan), y, how, base), restore(plan, y, how, base))


def test_copy_gives_nothing_to_what_nobody_took() -> None:
    y = torch.tensor([[[4.0], [7]], [[9], [0]]])
    assert Transform.of(folded()).restore(y).flatten().tolist() == [4, 4, 7, 0, 9, 0]
