"""Budgets are read and split exactly, plans obey their laws, tokens and reports say what they hold."""

import importlib.util
import json
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fewer.types
from fewer.report import LayerReport, Report
from fewer.signals import Queries, QueryWindow, Received
from fewer.types import (
    Budget,
    BudgetError,
    FewerError,
    MissingSignal,
    Plan,
    Tokens,
    UnknownName,
    UnsupportedModel,
)

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)

# --- Budget ---


@pytest.mark.parametrize(
    ("keep", "fraction", "tokens", "size"),
    [
        (0.25, 0.25, None, None),
        (1, 1.0, None, None),
        (1.0, 1.0, None, None),
        (2, None, 2, None),
        (4096, None, 4096, None),
        ("0.25", 0.25, None, None),
        ("2.5e-1", 0.25, None, None),
        ("1", 1.0, None, None),
        ("1.0", 1.0, None, None),
        (" 256 ", None, 256, None),
        ("1B", None, None, 1),
        ("500KB", None, None, 500_000),
        ("64MB", None, None, 64_000_000),
        (" 64 mb ", None, None, 64_000_000),
        ("2GB", None, None, 2_000_000_000),
        ("1KiB", None, None, 1024),
        ("1.5MiB", None, None, 1_572_864),
        ("1.5GiB", None, None, 1_610_612_736),
    ],
)
def test_every_form_of_keep(keep: Any, fraction: float | None, tokens: int | None, size: int | None) -> None:
    budget = Budget.parse(keep)
    assert (budget.fraction, budget.tokens, budget.size) == (fraction, tokens, size)
    assert budget.whole == (fraction == 1.0)


@pytest.mark.parametrize(
    ("keep", "complaint"),
    [
        (0, "would leave nothing"),
        (-1, "would leave nothing"),
        (0.0, "is not a fraction in"),
        (1.5, "is not a fraction in"),
        (-0.5, "is not a fraction in"),
        (float("nan"), "is not a fraction in"),
        (float("inf"), "is not a fraction in"),
        (True, "cannot be read"),
        (False, "cannot be read"),
        ("half", "cannot be read"),
        ("", "cannot be read"),
        ("25%", "cannot be read"),
        ("-3", "keep=-3 would leave nothing"),
        ("64 TB", "cannot be read"),
        ("MB", "cannot be read"),
        ("-1MB", "cannot be read"),
        ("nan", "keep=nan is not a fraction in"),
        ("1.5", "keep=1.5 is not a fraction in"),
        ("0", "keep=0 would leave nothing"),
        ("0MB", "is no bytes at all"),
        ("0.4B", "is no bytes at all"),
    ],
)
def test_what_keep_cannot_be(keep: Any, complaint: str) -> None:
    with pytest.raises(BudgetError) as refusal:
        Budget.parse(keep)
    assert complaint in str(refusal.value)
    assert f"keep={keep!r}" in str(refusal.value) or f"keep={keep} " in str(refusal.value)
    assert "a fraction in (0, 1], a token count such as 256, or bytes such as '64MB'" in str(refusal.value)


def unchecked(module: ModuleType) -> Any:
    """The module once more, without the shape and type checks of the tests: as users have it."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location("unchecked_types", module.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, spec.name, fresh)  # dataclasses look their module up
        spec.loader.exec_module(fresh)
    return fresh


@pytest.mark.parametrize("keep", [[], [0.5], None, {}, b"64MB", 1j])
def test_what_is_no_keep_at_all(keep: Any) -> None:
    types = unchecked(fewer.types)
    with pytest.raises(types.BudgetError, match="cannot be read; keep is what stays"):
        types.Budget.parse(keep)


def test_errors_are_value_errors() -> None:
    for error in (BudgetError, MissingSignal, UnsupportedModel, UnknownName):
        assert issubclass(error, FewerError) and issubclass(error, ValueError)


@pytest.mark.parametrize(
    ("keep", "seen", "count"),
    [
        (0.25, 1000, 250),
        (0.25, 1001, 251),
        (0.25, 1, 1),
        (0.1, 30, 3),
        (0.07, 100, 7),  # 7.000000000000001 in floating point
        (0.14, 50, 7),
        (0.55, 200, 110),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.5, 0, 0),
        (64, 1000, 64),
        (64, 10, 10),
    ],
)
def test_count(keep: float | int, seen: int, count: int) -> None:
    assert Budget.parse(keep).count(seen) == count


@quick
@given(st.floats(min_value=0, max_value=1, exclude_min=True), st.integers(1, 10**6))
def test_a_fraction_keeps_at_least_one_token_and_never_too_many(keep: float, seen: int) -> None:
    """`ceil(keep * seen)` of something is never nothing."""
    count = Budget.parse(keep).count(seen)
    assert 1 <= count <= seen
    assert abs(count - keep * seen) <= 1 + 1e-6


def test_bytes_become_tokens() -> None:
    """1,000 bytes at 64 a token are 15 tokens, which may not be reached but never exceeded."""
    budget = Budget.parse("1KB").within(lambda n: 64 * n)
    assert (budget.tokens, budget.size, budget.keep) == (15, None, "1KB")
    assert budget.count(100) == 15 and budget.count(3) == 3
    assert Budget.parse("64B").within(lambda n: 64 * n).count(9) == 1


@pytest.mark.parametrize("tokens", range(1, 18))
def test_bytes_that_fit_exactly_are_taken(tokens: int) -> None:
    assert Budget.parse(f"{64 * tokens}B").within(lambda n: 64 * n).tokens == tokens
    assert Budget.parse(f"{64 * tokens + 63}B").within(lambda n: 64 * n).tokens == tokens


def test_bytes_that_hold_no_token_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"keep='1KB' is below the 1,001 bytes that a single token takes"):
        Budget.parse("1KB").within(lambda n: 1001 * n)


def test_bytes_cannot_be_counted_before_the_size_is_known() -> None:
    with pytest.raises(BudgetError, match="needs the size of a token"):
        Budget.parse("1KB").count(10)


@pytest.mark.parametrize("keep", [0.5, 7, 1])
def test_within_leaves_other_budgets_alone(keep: float | int) -> None:
    assert Budget.parse(keep).within(lambda n: n * 10**9) == Budget.parse(keep)


@pytest.mark.parametrize(
    ("total", "weights", "caps", "parts"),
    [
        (10, [1.0, 1.0, 1.0], [9, 9, 9], [4, 3, 3]),
        (10, [8.0, 1.0, 1.0], [4, 9, 9], [4, 3, 3]),
        (0, [1.0, 2.0], [5, 5], [0, 0]),
        (9, [0.0, 0.0, 0.0], [5, 5, 5], [3, 3, 3]),
        (6, [1.0, 0.0], [4, 4], [4, 2]),
        (8, [1.0, 1.0], [4, 4], [4, 4]),
    ],
)
def test_split(total: int, weights: list[float], caps: list[int], parts: list[int]) -> None:
    assert Budget.split(total, weights, caps) == parts


def test_split_gives_what_is_left_to_the_largest_remainders() -> None:
    """9 by 5, 3, 2 is 4.5, 2.7, 1.8: 4, 2, 1 for sure, and the 2 left over go to .8 and .7, not to .5."""
    assert Budget.split(9, [5.0, 3.0, 2.0], [9, 9, 9]) == [4, 3, 2]


splits = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), min_size=1, max_size=8).flatmap(
    lambda parts: st.tuples(st.just(parts), st.integers(0, sum(cap for _, cap in parts)))
)


@quick
@given(splits)
def test_split_is_exact_and_respects_caps(case: tuple[list[tuple[float, int]], int]) -> None:
    parts, total = case
    weights, caps = [w for w, _ in parts], [c for _, c in parts]
    split = Budget.split(total, weights, caps)
    assert sum(split) == total
    assert all(0 <= part <= cap for part, cap in zip(split, caps, strict=True))


@quick
@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(0, 500))
def test_split_rounds_each_share_up_or_down(weights: list[int], total: int) -> None:
    split = Budget.split(total, [float(w) for w in weights], [total] * len(weights))
    for part, weight in zip(split, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-9


@quick
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 20))
def test_split_refuses_what_does_not_fit(caps: list[int], more: int) -> None:
    with pytest.raises(BudgetError, match=f"where only {sum(caps)} fit"):
        Budget.split(sum(caps) + more, [1.0] * len(caps), caps)


# --- Plan ---


def merging() -> Plan:
    """Five tokens to two: 0 (mass 3) and 1 (mass 1) become slot 0, 2 and 4 (mass 1 each) slot 1; 3 is dropped."""
    return Plan(
        slot=torch.tensor([[0, 0, 1, -1, 1]]),
        weight=torch.tensor([[0.75, 0.25, 0.5, 0.0, 0.5]]),
        survivors=torch.tensor([[0, 2]]),
    )


def column(*numbers: float) -> Tensor:
    return torch.tensor([[[float(x)] for x in numbers]])


def test_keep_drops_the_others() -> None:
    plan = Plan.keep(torch.tensor([[True, False, True, True], [False, False, True, False]]))
    assert plan.slot.tolist() == [[0, -1, 1, 2], [-1, -1, 0, -1]]
    assert plan.survivors.tolist() == [[0, 2, 3], [2, -1, -1]]
    assert plan.weight.tolist() == [[1, 0, 1, 1], [0, 0, 1, 0]]
    assert plan.counts.tolist() == [3, 1]
    x = torch.arange(1.0, 9).view(2, 4, 1)
    assert plan.pick(x)[..., 0].tolist() == plan.apply(x)[..., 0].tolist() == [[1, 3, 4], [7, 0, 0]]


def test_keep_of_nothing_and_of_everything() -> None:
    x = torch.randn(2, 3, 4)
    everything = Plan.keep(torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(everything.apply(x), x) and torch.equal(everything.pick(x), x)
    nothing = Plan.keep(torch.zeros(2, 3, dtype=torch.bool))
    assert nothing.pick(x).shape == nothing.apply(x).shape == (2, 0, 4)
    nothing.check()


def test_a_merge_is_the_size_weighted_mean() -> None:
    """(3 * 1 + 1 * 5) / 4 = 2 and (10 + 20) / 2 = 15; survivors' own features are 1 and 10."""
    plan, x = merging(), column(1, 5, 10, 99, 20)
    plan.check()
    assert plan.apply(x).flatten().tolist() == [2, 15]
    assert plan.pick(x).flatten().tolist() == [1, 10]
    assert plan.restore(plan.apply(x)).flatten().tolist() == [2, 2, 15, 0, 15]
    assert plan.restore(plan.apply(x), "zero").flatten().tolist() == [2, 0, 15, 0, 0]


def test_merging_equal_tokens_changes_nothing() -> None:
    assert merging().apply(column(4, 4, 7, 0, 7)).flatten().tolist() == [4, 7]


@st.composite
def plans(draw: st.DrawFn, n: int | None = None, lead: int = 2) -> Plan:
    """Any plan of uneven slots that merges with the mean of its members, here for tokens of mass 1."""
    n = draw(st.integers(1, 9)) if n is None else n
    slots, weights, survivors = [], [], []
    for _ in range(lead):
        homes = sorted(draw(st.sets(st.integers(0, n - 1), max_size=n)))
        slot = [homes.index(j) if j in homes else draw(st.integers(-1, len(homes) - 1)) for j in range(n)]
        slots.append(slot)
        weights.append([1 / slot.count(s) if s >= 0 else 0.0 for s in slot])
        survivors.append(homes)
    longest = max(len(homes) for homes in survivors)
    assume(longest > 0)
    padded = [[*homes, *[-1] * (longest - len(homes))] for homes in survivors]
    return Plan(torch.tensor(slots), torch.tensor(weights), torch.tensor(padded, dtype=torch.long).view(lead, longest))


def features(plan: Plan, seed: int = 0) -> Tensor:
    return torch.randn(*plan.slot.shape, 3, generator=torch.Generator().manual_seed(seed))


@quick
@given(plans())
def test_applying_again_after_restoring_gives_the_slots_back(plan: Plan) -> None:
    plan.check()
    once = plan.apply(features(plan))
    torch.testing.assert_close(plan.apply(plan.restore(once)), once)


def test_a_plan_that_keeps_nothing_restores_zeros() -> None:
    x = torch.randn(2, 3, 4)
    nothing = Plan.keep(torch.zeros(2, 3, dtype=torch.bool))
    for how in ("copy", "zero"):
        assert torch.equal(nothing.restore(nothing.apply(x), how), torch.zeros_like(x))
    assert nothing.then(Plan.keep(torch.zeros(2, 0, dtype=torch.bool))).slot.tolist() == [[-1] * 3] * 2


@quick
@given(st.data())
def test_a_composition_is_one_after_the_other(data: st.DataObject) -> None:
    first = data.draw(plans())
    second = data.draw(plans(n=first.survivors.shape[-1]))
    empty = first.survivors < 0
    if bool((empty & (second.slot >= 0)).any()):  # a plan may not speak of slots that do not exist
        second = Plan.keep((second.slot >= 0) & ~empty)
        assume(second.survivors.shape[-1] > 0)
    both, x = first.then(second), features(first)
    both.check()
    torch.testing.assert_close(both.apply(x), second.apply(first.apply(x)))
    torch.testing.assert_close(both.pick(x), second.pick(first.pick(x)))
    y = second.apply(first.apply(x))
    torch.testing.assert_close(both.restore(y), first.restore(second.restore(y)))


def test_the_size_weighted_mean_composes() -> None:
    """Merging 4 tokens into 2 (3 and 1 of them) and those into 1 is the mean of all 4: (1 + 2 + 3 + 10) / 4 = 4."""
    third = 1 / 3
    first = Plan(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[third, third, third, 1.0]]), torch.tensor([[0, 3]]))
    second = Plan(torch.tensor([[0, 0]]), torch.tensor([[0.75, 0.25]]), torch.tensor([[0]]))
    both = first.then(second)
    torch.testing.assert_close(both.weight, torch.full((1, 4), 0.25))
    torch.testing.assert_close(both.apply(column(1, 2, 3, 10)), column(4))


def test_a_composition_keeps_where_the_first_plan_moved_its_survivors() -> None:
    """Tokens 0, 2, 3 go to the positions 7, 8, 9; of these the second plan keeps the last two: 8, 9."""
    first = replace(Plan.keep(torch.tensor([[True, False, True, True]])), moved=torch.tensor([[7, 8, 9]]))
    second = Plan.keep(torch.tensor([[False, True, True]]))
    both = first.then(second)
    assert both.survivors.tolist() == [[2, 3]]
    assert both.moved is not None and both.moved.tolist() == [[8, 9]]
    again = first.then(replace(second, moved=torch.tensor([[4, 5]])))
    assert again.moved is not None and again.moved.tolist() == [[4, 5]]


def test_slots_that_do_not_exist_are_zero_whatever_the_features() -> None:
    """A head without survivors, where token 0 is not a number: `pick` and `apply` still give zeros."""
    plan = Plan.keep(torch.tensor([[False, True], [False, False]]))
    x = torch.tensor([[[torch.nan], [2.0]], [[torch.nan], [torch.inf]]])
    assert plan.apply(x).flatten().tolist() == [2, 0]
    assert plan.pick(x).flatten().tolist() == [2, 0]


@pytest.mark.parametrize("how", ["apply", "pick"])
def test_plans_keep_the_dtype(how: str) -> None:
    x = torch.randn(1, 5, 2).to(torch.bfloat16)
    assert getattr(merging(), how)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (replace(merging(), slot=torch.tensor([[-1, 0, 1, -1, 1]])), "lost silently"),
        (replace(merging(), slot=torch.tensor([[1, 0, 1, -1, 1]])), "lost silently"),
        (replace(merging(), survivors=torch.tensor([[3, 2]])), "lost silently"),
        (Plan(torch.tensor([[1, 0]]), torch.ones(1, 2), torch.tensor([[1, 0]])), "original order"),
        (Plan(torch.tensor([[-1, 1]]), torch.ones(1, 2), torch.tensor([[-1, 1]])), "original order"),
        (replace(merging(), slot=torch.tensor([[0, 0, 1, 2, 1]])), "slot that does not exist"),
        (Plan(torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2), torch.tensor([[0, 1], [0, -1]])), "does not exist"),
    ],
    ids=["dropped", "elsewhere", "not there", "reversed", "gap", "out of range", "out of a short head's range"],
)
def test_check_finds_faults(plan: Plan, complaint: str) -> None:
    with pytest.raises(FewerError, match=complaint):
        plan.check()


def test_check_finds_kept_padding() -> None:
    padding = torch.tensor([[True, False, False, False, False]])
    with pytest.raises(FewerError, match="keeps padding"):
        merging().check(padding)
    merging().check(torch.tensor([[False, False, False, True, False]]))


# --- Tokens and reports ---


def test_tokens_give_signals_of_the_right_kind_or_say_so() -> None:
    padding = torch.tensor([[[True, False, False]], [[False, False, False]]])
    tokens = Tokens(
        features=torch.zeros(2, 1, 3, 4),
        positions=torch.zeros(2, 1, 3, dtype=torch.long),
        padding=padding,
        protected=~padding,
        seen=torch.tensor([2, 3]),
        signals={Received: torch.ones(2, 1, 3), Queries: None},
    )
    assert tokens.available.tolist() == [[2], [3]]
    assert tokens.signal(Received, Tensor).sum() == 6
    for need, kind in ((Queries, QueryWindow), (Received, QueryWindow)):
        with pytest.raises(MissingSignal, match=need.__name__):
            tokens.signal(need, kind)


def report() -> Report:
    layers = (
        LayerReport(0, "compressed", (10, 8), (5, 4), ((5, 5), (4, 4)), 1000, 500, 20, 0.25),
        LayerReport(1, "whole", (10, 8), (), ((10, 10), (8, 8)), 1000, 1000, 0, 0.0),
        LayerReport(2, "left alone", (10, 8), (), (), 400, 400, 0, 0.0),
    )
    return Report("snapkv", 0.5, layers, ("a remark",), peak=2300, transient=64, step_seconds=0.0125)


def test_a_report_adds_up() -> None:
    """Of layer 0's 36 entries 18 stay, of layer 1's 36 all: 54 of 72; layer 2 does not count."""
    found = report()
    assert (found.bytes_full, found.bytes_kept, found.metadata, found.seconds) == (2400, 1900, 20, 0.25)
    assert found.kept == 0.75
    assert Report("full", 1.0, ()).kept == 1.0
    data = json.loads(json.dumps(found.to_dict()))
    assert data["kept"] == 0.75 and data["layers"][0]["kept"] == [[5, 5], [4, 4]] and data["notes"] == ["a remark"]


def test_a_report_reads_well() -> None:
    text = str(report())
    assert text.startswith("snapkv keep=0.5: kept 75.0% of the entries, 1,900 of 2,400 bytes (20 of them metadata)")
    assert text.endswith("note: a remark")
    held = "at most 2,300 bytes held at once, 64 more unpacked in a decoding step; the last decoding step took 12.5 ms"
    assert text.splitlines()[1] == held
    assert len(text.splitlines()) == 3 + 3 + 1
