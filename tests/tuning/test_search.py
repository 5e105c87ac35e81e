"""The race, the ladder and the promise, on a host that loses what it is told to; the numbers are worked by hand."""

import random
from dataclasses import replace

import pytest

from fewer.tuning import risk
from fewer.tuning.hosts import Answer
from fewer.tuning.journal import Journal
from fewer.tuning.losses import changed, lost, numbers, wrong
from fewer.tuning.result import Measured
from fewer.tuning.search import RUNGS, Bench, best, frontier, ladder, plausible, promise, race
from fewer.tuning.setting import Setting
from fewer.types import FewerError
from tests.tuning.talking import Told, examples, told


def bench(host: Told) -> Bench:
    return Bench(host, wrong, Journal(None, {}), "memory")


def row(keep: float, loss: float) -> Measured:
    return Measured(told(keep), 10, loss, 1000 * keep, 10.0)


def test_a_candidate_goes_out_when_its_loss_would_be_rare() -> None:
    # 1 of 8 at a true loss of 0.02: 1 - 0.98^8 = 0.149; 2 of 8: 1 - 0.98^8 - 8 * 0.02 * 0.98^7 = 0.010
    assert plausible(0.0, 8, 0.02) and plausible(1 / 8, 8, 0.02) and not plausible(2 / 8, 8, 0.02)
    assert not plausible(1.0, 8, 0.3) and plausible(0.3, 100, 0.3)


def test_the_frontier_and_what_stands_behind_it() -> None:
    rows = [row(0.5, 0.0), row(0.4, 0.1), row(0.3, 0.1), row(0.2, 0.3), row(0.6, 0.0), row(0.25, 0.2)]
    assert [one.setting.held.keep for one in frontier(rows, "memory")] == [0.2, 0.25, 0.3, 0.5]
    # of 8 rungs between 0.2 and 0.6 each of these has one of its own: the four dearest first, then from the frontier
    assert [one.setting.held.keep for one in best(rows, "memory", 8)] == [0.6, 0.5, 0.4, 0.3, 0.2, 0.25]
    assert [one.setting.held.keep for one in best(rows, "memory", 2)] == [0.6, 0.2]
    assert best([], "memory", 3) == [] and best(rows[:1], "memory", 3) == rows[:1]


def test_the_ladder_goes_down_in_cost_and_takes_the_best_of_each_rung() -> None:
    keeps = {0.9: 0.0, 0.88: 0.5, 0.5: 0.0, 0.48: 0.0, 0.2: 0.3, 0.1: 0.4}
    host = Told(keeps)
    test, few = bench(host), examples(20)
    settings = [told(keep) for keep in keeps]
    test.ask("x", few, settings)
    found = [test.measured(one, few) for one in settings]
    full = test.measured(Setting(), few)
    rungs = ladder(test, found, full, few)
    costs = [one.bytes for one in rungs]
    assert costs == sorted(costs, reverse=True) and len(rungs) <= RUNGS and full.bytes == 1000
    kept = [one.setting.held.keep for one in rungs]
    assert 0.88 not in kept and 0.9 in kept and 0.1 in kept
    assert ladder(test, [full], full, few) == []  # nothing that is cheaper


def test_the_promise_stops_at_the_first_that_does_not_pass() -> None:
    host = Told({0.5: 0.0, 0.4: 0.0, 0.3: 1.0, 0.2: 0.0})
    test, many = bench(host), examples(200)
    rungs = [row(keep, 0.0) for keep in (0.5, 0.4, 0.3, 0.2)]
    tested, passed = promise(test, rungs, many, 0.02, 0.95)
    assert passed == 2 and [one.p is not None for one in tested] == [True, True, False, False]
    assert tested[0].n == 200 and tested[0].p == pytest.approx(0.98**200)
    # 0.3 lost every time and was given up with those after it: not all of them were asked
    assert host.asked < 5 * 200 and tested[2].n == tested[3].n < 10 and tested[2].loss == 1


def test_a_setting_that_is_refused_in_calibration_ends_there_and_nothing_else() -> None:
    class Late(Told):
        def ask(self, example, settings):
            said = super().ask(example, settings)
            late = int(example.answers[0]) > 20
            return [
                Answer("", refused="too small") if late and one.held and one.held.keep == 0.3 else answer
                for one, answer in zip(settings, said, strict=True)
            ]

    test = bench(Late({0.3: 0.01}))
    tested, passed = promise(test, [row(0.5, 0.0), row(0.3, 0.0)], examples(200), 0.02, 0.95)
    assert passed == 1 and tested[1].p is None


def test_a_context_counts_once() -> None:
    many = [replace(one, question=f"{one.question} {i}") for one in examples(60) for i in range(4)]
    test = bench(Told({}))
    tested, passed = promise(test, [row(0.5, 0.0)], many, 0.05, 0.95)
    assert tested[0].n == 60 and tested[0].p == pytest.approx(0.95**60) and passed == 1


def test_what_is_measured_is_what_is_promised() -> None:
    """One context with many questions that all go wrong weighs as much as any other."""
    many = examples(40)
    bad = [replace(many[0], question=f"{many[0].question} {i}", answers=("never",)) for i in range(60)]

    class Fails(Told):
        def ask(self, example, settings):
            lost = example.answers == ("never",)
            return [Answer("none" if lost and one.held else example.answers[0], 10.0) for one in settings]

    test, all_ = bench(Fails({})), [*many[1:], *bad]
    tested, _ = promise(test, [row(0.5, 0.0)], all_, 0.2, 0.9)
    assert tested[0].n == 40 and tested[0].loss == pytest.approx(1 / 40)
    assert tested[0].p == pytest.approx(risk.p_value([1.0] + [0.0] * 39, 0.2))


def test_the_promise_is_kept_over_many_draws() -> None:
    """The chosen setting's true loss is above what was asked in at most 1 - confidence of the draws."""
    risks = {0.5: 0.01, 0.4: 0.06, 0.3: 0.11, 0.2: 0.3}
    asked, confidence, draws, broken = 0.1, 0.9, 200, 0
    naive = 0
    chance = random.Random(3)
    for _ in range(draws):
        losses = {keep: [float(chance.random() < risk_) for _ in range(100)] for keep, risk_ in risks.items()}
        ps = [risk.p_value(one, asked) for one in losses.values()]
        passed = risk.fixed_sequence(ps, 1 - confidence)
        broken += passed > 0 and list(risks.values())[passed - 1] > asked
        means = [sum(one) / len(one) <= asked for one in losses.values()]  # what a hopeful reader would do
        naive += max((r for r, ok in zip(risks.values(), means, strict=True) if ok), default=0) > asked
    allowed = draws * (1 - confidence) + 3 * (draws * 0.1 * 0.9) ** 0.5
    assert broken <= allowed < naive


def test_the_race_drops_losers_and_says_what_it_left_out() -> None:
    class Refusing(Told):
        def ask(self, example, settings):
            said = super().ask(example, settings)
            return [
                Answer("", refused="too small") if one.held and one.held.keep == 0.01 else answer
                for one, answer in zip(settings, said, strict=True)
            ]

    test = bench(Refusing({0.1: 0.9}))
    found, notes = race(test, [told(0.5), told(0.1), told(0.01)], examples(60), 0.05)
    assert [one.setting.held.keep for one in found] == [0.5] and found[0].n == 60
    assert notes == ["snapkv @ 0.01 is left out: too small"]
    assert found[0].tasks == {"odd": 0.0}


def test_losses_by_hand() -> None:
    (one,) = examples(1)
    assert changed(" It IS 4.\n", "it is 4", one) == 0 and changed("4", "5", one) == 1
    assert wrong("it is 0", "it is 1", one) == 1 and wrong("1", "0", one) == 0
    assert numbers("2 of 2, and 1,000.5", "2; 1,000.5", one) == pytest.approx(1 / 3) and numbers("none", "4", one) == 0


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
def test_a_loss_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(FewerError, match=r"example 1; a loss lies in \[0, 1\]"):
        lost(lambda full, said, example: value, "a", "b", examples(1)[0])
