"""Merging: who may join whom, and means by size."""

import pytest
import torch

from fewer.allocate.joining import halving, joining
from fewer.reduce.fold import closed, fold, gather_in, halves, masses, propose, weighed
from fewer.types import Allocation, Budget, FewerError, Matching, Plan, Tokens
from tests.methods.vit.build import groups, place

INF = torch.inf


def matching(value: list[float], partner: list[int]) -> Matching:
    return Matching(torch.tensor([value]), torch.tensor([partner]))


def three(mass: list[float] | None = None, **options: object) -> Tokens:
    """One row of tokens 2, 4 and 12, none of them a class token."""
    given = None if mass is None else torch.tensor([mass], dtype=torch.float32)
    return place(3, rows=1, prefix=0, features=torch.tensor([[[2.0], [4], [12]]]), mass=given, **options)  # type: ignore[arg-type]


def kept(*counts: int) -> Allocation:
    return Allocation(torch.tensor(counts))


# --- masses and closed ---


def test_a_token_stands_for_itself_unless_told() -> None:
    assert masses(three()).tolist() == [[1, 1, 1]] and masses(three()).dtype == torch.float32
    given = place(2, rows=1, mass=torch.tensor([[2.0, 3.0]], dtype=torch.float64))
    assert masses(given).tolist() == [[2, 3]] and masses(given).dtype == torch.float32


def test_class_tokens_and_padding_are_closed() -> None:
    tokens = place(5, prefix=1, lengths=[5, 3], protect=[2])
    assert closed(tokens).tolist() == [[True, False, True, False, False], [True, False, True, True, True]]


# --- halves and propose ---


def test_even_tokens_propose_to_the_odd_one_they_are_most_like() -> None:
    """(1, 0) has the cosines 0.6 and -1 with (3, 4) and (-1, 0); (0, 5) has 0.8 and 0."""
    metric = torch.tensor([[[1.0, 0], [3, 4], [0, 5], [-1, 0]]])
    found = halves(place(4, rows=1, prefix=0), metric)
    torch.testing.assert_close(found.value, torch.tensor([[-0.6, INF, -0.8, INF]]))
    assert found.partner.tolist() == [[1, 1, 1, 3]]


def test_length_counts_in_no_cosine_and_may_be_zero() -> None:
    metric = torch.tensor([[[1e-3, 0], [1e6, 0], [0, 0], [0, 1]]])
    found = halves(place(4, rows=1, prefix=0), metric)
    torch.testing.assert_close(found.value, torch.tensor([[-1.0, INF, 0.0, INF]]))


def test_who_is_closed_neither_proposes_nor_is_proposed_to() -> None:
    """Everybody is alike, so token 0's partner would be 1; 1 is closed, then 3 takes it, then nobody."""
    alike = torch.ones(1, 3, 2)
    for protect, value, partner in (
        ((), [-1, INF, -1, INF, -1], 1),
        ((1,), [-1, INF, -1, INF, -1], 3),
        ((0, 1), [INF, INF, -1, INF, -1], None),
        ((1, 3), [INF, INF, INF, INF, INF], None),
    ):
        found = propose(place(5, rows=1, prefix=0, protect=protect), alike)
        assert found.value.tolist() == [value]
        assert partner is None or found.partner[0, [0, 2, 4]].tolist() == [partner] * 3


def test_padding_is_closed_whatever_is_in_it() -> None:
    metric = torch.tensor([[[1.0, 0], [1, 0.5], [0, 1], [torch.nan, 1], [torch.nan, 0]]])
    found = halves(place(5, rows=1, prefix=0, lengths=[3]), metric)
    assert found.partner[0, [0, 2]].tolist() == [1, 1] and found.value[0, 4] == INF
    assert bool(found.value[0, [0, 2]].isfinite().all())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_tokens(n: int) -> None:
    found = halves(place(n, rows=2, prefix=0), torch.ones(2, n, 4))
    assert found.value.shape == (2, n) and bool((found.partner < n).all())
    assert found.value[0].tolist() == pytest.approx([[INF], [-1, INF], [-1, INF, -1]][n - 1])


# --- fold ---


def test_the_worst_go_into_their_partners() -> None:
    """Token 0 is worth least and goes into 1: (2 + 4) / 2 = 3."""
    plan = fold(three(), matching([-0.9, INF, -0.1], [1, 1, 1]), kept(2))
    assert groups(plan) == [[0, 1], [2]] and plan.survivors.tolist() == [[1, 2]]
    assert plan.weight.tolist() == [[0.5, 0.5, 1]] and plan.mass.tolist() == [[2, 1]]
    assert plan.apply(three().features).flatten().tolist() == [3, 12]


def test_means_are_by_size() -> None:
    """(1 * 2 + 3 * 4) / 4 = 3.5, and all three, (2 + 12 + 4 * 12) / 8 = 7.75."""
    tokens = three([1, 3, 4])
    plan = fold(tokens, matching([-0.9, INF, -0.1], [1, 1, 1]), kept(2))
    assert plan.apply(tokens.features).flatten().tolist() == [3.5, 12] and plan.mass.tolist() == [[4, 4]]
    plan = fold(tokens, matching([-0.9, INF, -0.1], [1, 1, 1]), kept(1))
    assert plan.apply(tokens.features).flatten().tolist() == [7.75] and plan.mass.tolist() == [[8]]


def test_rows_of_different_counts_and_padding() -> None:
    tokens = place(4, prefix=0, lengths=[4, 2], mass=torch.tensor([[1.0, 2, 3, 4], [5, 6, 99, 99]]))
    found = Matching(
        torch.tensor([[-0.9, INF, -0.1, INF], [-0.5, INF, -INF, -INF]]), torch.tensor([[3, 1, 1, 3], [1, 1, 1, 0]])
    )
    plan = fold(tokens, found, kept(3, 1))
    plan.check(tokens.padding)
    assert groups(plan, 0) == [[1], [2], [0, 3]] and groups(plan, 1) == [[0, 1]]
    assert plan.mass.tolist() == [[2, 3, 5], [11, 0, 0]] and plan.slot[1, 2:].tolist() == [-1, -1]
    torch.testing.assert_close(plan.weight[1], torch.tensor([5 / 11, 6 / 11, 0, 0]))


def test_a_partner_that_is_given_up_itself_is_an_error() -> None:
    """0 is to join 1 and 1 to join 2: token 0 would be lost."""
    with pytest.raises(FewerError, match="a token was to join one that is given up itself"):
        fold(three(), matching([-0.9, -0.8, INF], [1, 2, 2]), kept(1))


def test_keeping_all_changes_nothing() -> None:
    tokens = place(9, mass=torch.rand(2, 9) + 1)
    plan = fold(tokens, halves(tokens, tokens.features), kept(9, 9))
    assert torch.equal(plan.apply(tokens.features), tokens.features) and torch.equal(plan.weight, torch.ones(2, 9))
    assert torch.equal(plan.mass, tokens.mass)


# --- weights of one's own ---


def test_other_weights_leave_masses_alone() -> None:
    """By weights 3 and 1 the mean of 2 and 4 is 2.5; the slot stands for 1 + 5 all the same."""
    tokens = three([1, 5, 1])
    plan = Plan.keep(torch.tensor([[False, True, True]]))
    plan = gather_in(tokens, plan, torch.tensor([[1, 1, 2]]), torch.tensor([[3.0, 1, 1]]))
    assert plan.apply(tokens.features).flatten().tolist() == [2.5, 12] and plan.mass.tolist() == [[6, 1]]


def test_dropped_tokens_take_their_mass_with_them() -> None:
    tokens = three([1, 5, 2])
    plan = weighed(tokens, Plan.keep(torch.tensor([[True, False, True]])), masses(tokens))
    assert plan.mass.tolist() == [[1, 2]] and plan.weight.tolist() == [[1, 0, 1]]


def test_weights_of_nothing_give_nothing_rather_than_no_number() -> None:
    tokens = three([0, 0, 1])
    plan = fold(tokens, matching([-0.9, INF, -0.1], [1, 1, 1]), kept(2))
    assert plan.apply(tokens.features).flatten().tolist() == [0, 12]


# --- what holds for all ---


@pytest.mark.parametrize("n", [7, 24, 65])
def test_merging_twice_is_merging_once(n: int) -> None:
    """Two folds give what the sums of all members give, by hand: sizes make means compose."""
    tokens = place(n, mass=torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(n)).float())
    first = fold(tokens, halves(tokens, tokens.features), kept(*[n - n // 3] * 2))
    x = first.apply(tokens.features)
    between = place(x.shape[1], features=x, mass=first.mass)
    second = fold(between, halves(between, x), kept(*[n - n // 3 - n // 5] * 2))
    both, out = first.then(second), second.apply(x)
    assert isinstance(both, Plan)
    for row in range(2):
        for slot, members in enumerate(groups(both, row)):
            size = tokens.mass[row, members]
            expected = (size.unsqueeze(-1) * tokens.features[row, members]).sum(0) / size.sum()
            torch.testing.assert_close(out[row, slot], expected)
            assert float(second.mass[row, slot]) == float(size.sum())


def test_no_more_leave_than_have_somebody_to_join() -> None:
    """Tokens 2 and 4 may go, behind a class token; halving lets two of four open ones go, whoever they are."""
    tokens = place(5)
    found = halves(tokens, tokens.features)
    for tokens_left, counts in ((1, 3), (2, 3), (3, 4), (4, 5)):
        budget = Budget(tokens_left, tokens=tokens_left, beside=1)
        assert joining(tokens, found, budget).counts.tolist() == [counts] * 2
        assert halving(tokens, budget).counts.tolist() == [counts] * 2
    padded = place(6, lengths=[6, 4])  # five open ones, and three
    assert halving(padded, Budget(1, tokens=1, beside=1)).counts.tolist() == [4, 3]
