"""Alarms: rarely false over all time, soon where there is drift; and a monitor that is stopped and taken up again."""

import inspect
import json
import logging
import math
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fewer import monitor as module
from fewer.monitor import BETS, Monitor
from fewer.types import FewerError, UnknownName


def differ(full: str, said: str) -> float:
    return float(full != said)


SHARES = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]


def naive(losses: list[float], alpha: float) -> float:
    """Every bet from every start, each followed by itself, and what is kept for starts to come."""
    n = len(losses)
    begun = sum(
        1 / (s * (s + 1)) * math.prod(1 + bet * (x - alpha) / alpha for x in losses[s - 1 :]) / len(SHARES)
        for s in range(1, n + 1)
        for bet in SHARES
    )
    return begun + 1 - sum(1 / (s * (s + 1)) for s in range(1, n + 1))


def test_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bet of a half, alpha a half: each loss of 1 makes one and a half of what was bet, each 0 a half."""
    monkeypatch.setattr(module, "BETS", (0.5,))
    monitor = Monitor(0.5)
    assert monitor.wealth == 1.0
    monitor.add_loss(1)  # half of the money is bet: 3/4, and 1/2 is kept
    assert monitor.wealth == pytest.approx(3 / 4 + 1 / 2)
    monitor.add_loss(1)  # 1/6 joins the bets: 11/12 becomes 11/8, and 1/3 is kept
    assert monitor.wealth == pytest.approx(11 / 8 + 1 / 3)
    monitor.add_loss(0)  # 1/12 joins: 35/24 becomes 35/48, and 1/4 is kept
    assert monitor.wealth == pytest.approx(35 / 48 + 1 / 4)


def test_agrees_with_the_naive_products() -> None:
    rng = np.random.default_rng(0)
    monitor, losses = Monitor(0.1), []
    for loss in (rng.random(60) * (rng.random(60) < 0.7)).tolist():
        holds = monitor.add_loss(loss)
        losses.append(loss)
        assert monitor.wealth == pytest.approx(naive(losses, 0.1), rel=1e-9)
        assert holds == monitor.holds == (monitor.wealth < 20)
        if not holds:
            break
    assert monitor.mean == pytest.approx(np.mean(losses))
    assert not monitor.holds


def alarms(alpha: float, draws: list[list[float]]) -> float:
    """The share of runs with an alarm at any time."""
    broken = 0
    for losses in draws:
        monitor = Monitor(alpha, confidence=0.9)
        broken += not all(monitor.add_loss(loss) for loss in losses)
    return broken / len(draws)


def by_the_mean(alpha: float, draws: list[list[float]]) -> float:
    """Broken: an alarm as soon as a test at 0.9 for this many examples would give one, at every look."""
    z, n = 1.2816, np.arange(1, len(draws[0]) + 1)
    mean = np.cumsum(draws, 1) / n
    return float(np.mean((mean > alpha + z * np.sqrt(alpha * (1 - alpha) / n))[:, 20:].any(1)))


ALLOWED = 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)


def null(kind: str) -> list[list[float]]:
    """Losses whose mean is just what is allowed, for 400 checks."""
    rng = np.random.default_rng(0)
    if kind == "binary":
        return (rng.random((200, 400)) < 0.1).astype(float).tolist()
    return rng.beta(0.1, 0.9, (200, 400)).tolist()


@pytest.mark.parametrize("kind", ["binary", "graded"])
def test_false_alarms_are_no_more_often_than_allowed(kind: str) -> None:
    draws = null(kind)
    assert alarms(0.1, draws) <= ALLOWED
    assert alarms(0.06, draws) > ALLOWED  # the same losses where less was promised


def test_the_simulation_sees_an_alarm_that_looks_too_often() -> None:
    assert by_the_mean(0.1, null("binary")) > ALLOWED


def test_a_drift_is_noticed_even_after_a_long_good_time() -> None:
    rng = np.random.default_rng(1)
    for before in (0, 100, 3000):
        monitor = Monitor(0.02)
        for loss in (rng.random(before) < 0.005).astype(float).tolist():
            assert monitor.add_loss(loss)
        for loss in (rng.random(400) < 0.2).astype(float).tolist():
            monitor.add_loss(loss)
        assert monitor.broken_at is not None
        assert before < monitor.broken_at < before + 200


@pytest.mark.parametrize(("alpha", "every", "at"), [(0.1, 1, 4), (0.02, 10, 50), (0.02, 25, 575), (0.01, 50, 1200)])
def test_how_soon_the_alarm_comes(alpha: float, every: int, at: int) -> None:
    """Where one check in so many loses all; the nearer that is to what is allowed, the smaller the bets that tell."""
    monitor, losses = Monitor(alpha), [float(i % every == 0) for i in range(1, at + 1)]
    assert [monitor.add_loss(loss) for loss in losses] == [True] * (at - 1) + [False]
    assert naive(losses[:-1], alpha) < 20 <= naive(losses, alpha)


def test_the_alarm_stays() -> None:
    monitor = Monitor(0.1)
    while monitor.add_loss(1):
        pass
    at, wealth = monitor.broken_at, monitor.wealth
    assert wealth >= 20
    assert not any(monitor.add_loss(0) for _ in range(500))
    assert (monitor.broken_at, monitor.wealth, monitor.checked) == (at, wealth, at + 500)  # type: ignore[operator]
    assert monitor.mean < 0.1


# --- drawing, watching ---


def test_a_share_is_drawn_the_same_for_a_seed() -> None:
    drawn = [
        [m.draw() for _ in range(4000)]
        for m in (Monitor(0.1, share=0.1), Monitor(0.1, share=0.1), Monitor(0.1, seed=1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sum(drawn[0]) == pytest.approx(400, abs=4 * math.sqrt(360))
    assert all(Monitor(0.1, share=1).draw() for _ in range(10))


def test_watch_gives_the_compressed_answer_and_asks_both_where_drawn() -> None:
    monitor, asked = Monitor(0.1, share=0.3, measure=differ), []

    def full(i: int) -> str:
        asked.append(i)
        return f"answer {i}"

    said = [monitor.watch(lambda i=i: f"answer {i - i % 2}", lambda i=i: full(i)) for i in range(200)]  # type: ignore[misc]
    assert said == [f"answer {i - i % 2}" for i in range(200)]
    again = Monitor(0.1, share=0.3)
    assert asked == [i for i in range(200) if again.draw()]
    assert monitor.checked == len(asked)
    assert monitor.mean == pytest.approx(np.mean([i % 2 for i in asked]))


def test_a_check_that_fails_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise ConnectionError("prompt: my secret")

    monitor = Monitor(0.1, share=1, measure=differ)
    with caplog.at_level(logging.ERROR, logger="fewer.monitor"):
        assert monitor.watch(lambda: "yes", fail) == "yes"
    assert (monitor.failed, monitor.checked) == (1, 0)
    assert "ConnectionError" in caplog.text
    assert "secret" not in caplog.text
    assert str(monitor).endswith("1 checks failed.")
    with pytest.raises(ConnectionError):
        monitor.watch(fail, lambda: "yes")
    broken = Monitor(0.1, share=1, measure=lambda full, said: 7.0)
    assert broken.watch(lambda: "a", lambda: "b") == "a"
    assert broken.failed == 1


def test_threads_lose_nothing() -> None:
    monitor = Monitor(0.9, share=1, measure=differ)

    def work() -> None:
        for i in range(300):
            monitor.watch(lambda: "a", lambda i=i: "a" if i % 3 else "b")  # type: ignore[misc]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (monitor.drawn, monitor.checked, monitor.total) == (1200, 1200, 400.0)


# --- state ---


@pytest.mark.parametrize("after", [0, 30, 300])
def test_resumed_is_as_if_never_stopped(after: int) -> None:
    rng = np.random.default_rng(3)
    losses = ((rng.random(400) < 0.1) * rng.random(400)).tolist()

    def run(monitor: Monitor, some: list[float]) -> Monitor:
        for loss in some:
            if monitor.draw():
                monitor.add_loss(loss)
        return monitor

    whole = run(Monitor(0.03, share=0.7, seed=5), losses)
    part = run(Monitor(0.03, share=0.7, seed=5), losses[:after])
    resumed = run(Monitor.resume(json.loads(json.dumps(part.state()))), losses[after:])
    assert resumed.state() == whole.state()
    assert str(resumed) == str(whole)


def test_an_alarm_survives_a_restart() -> None:
    monitor = Monitor(0.1)
    while monitor.add_loss(1):
        pass
    monitor.add_loss(0)
    assert not Monitor.resume(monitor.state()).holds


def test_a_measure_of_ones_own_is_given_again() -> None:
    state = Monitor(0.1, measure=differ).state()
    assert Monitor.resume(state, measure=differ).add("a", "b")
    with pytest.raises(FewerError, match="its own function; give measure="):
        Monitor.resume(state)
    with pytest.raises(FewerError, match="'changed'; leave measure out"):
        Monitor.resume(Monitor(0.1).state(), measure=differ)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": 2.0}, "loss=2.0 is not in"),
        ({"loss": "0.1"}, "loss='0.1' cannot be read"),
        ({"checked": -1}, "counts do not fit"),
        ({"checked": True}, "checked=True cannot be read"),
        ({"total": 99.0}, "counts do not fit"),
        ({"total": math.nan}, "counts do not fit"),
        ({"broken_at": 7}, "counts do not fit"),
        ({"broken_at": 2}, "stakes do not fit its alarm"),
        ({"stakes": [0.1]}, "stakes="),
        ({"stakes": [math.inf] * len(BETS)}, "stakes="),
        ({"stakes": ["1"] * len(BETS)}, "stakes="),
        ({"stakes": [1000.0] * len(BETS)}, "stakes do not fit its alarm"),
        ({"named": "nonsense"}, "nonsense"),
        ({"extra": 1}, "no state"),
    ],
)
def test_a_state_that_was_changed(change: dict[str, Any], said: str) -> None:
    monitor = Monitor(0.1)
    monitor.add_loss(0.5)
    monitor.add_loss(0)
    with pytest.raises(FewerError, match=said):
        Monitor.resume({**monitor.state(), **change})


def test_a_state_that_was_cut_off() -> None:
    state = Monitor(0.1).state()
    for name in state:
        with pytest.raises(FewerError, match="no state"):
            Monitor.resume({key: value for key, value in state.items() if key != name})


# --- measures, plans, words ---


def test_measures_by_name() -> None:
    monitor = Monitor(0.5)
    monitor.add("Paris", "paris.")
    assert monitor.mean == 0
    numbers = Monitor(0.5, measure="numbers")
    numbers.add("12 and 30", "only 12")
    assert numbers.mean == 0.5
    with pytest.raises(FewerError, match="needs right answers"):
        Monitor(0.1, measure="wrong")
    with pytest.raises(UnknownName, match="chnged"):
        Monitor(0.1, measure="chnged")


def plan(measure: str) -> SimpleNamespace:
    return SimpleNamespace(promise=SimpleNamespace(loss=0.03, confidence=0.9, measure=measure))


def test_of_a_plan() -> None:
    monitor = Monitor.of(plan("numbers"), share=0.5)
    assert (monitor.loss, monitor.confidence, monitor.share, monitor.named) == (0.03, 0.9, 0.5, "numbers")
    assert monitor.note == ""
    wrong = Monitor.of(plan("wrong"))
    assert wrong.named == "changed"
    assert "promise is of wrong answers" in str(wrong)
    assert str(Monitor.resume(wrong.state())) == str(wrong)
    own = Monitor.of(plan("wrong"), measure=differ, loss=0.2)
    assert (own.measure, own.loss, own.note) == (differ, 0.2, "")


def test_numbers_of_numpy_are_numbers() -> None:
    monitor = Monitor(0.1, measure=lambda full, said: np.float32(full != said))  # type: ignore[arg-type, return-value]
    monitor.add("a", "b")
    assert json.loads(json.dumps(monitor.state()))["total"] == 1.0
    with pytest.raises(FewerError, match=r"seed=1\.5 is no whole number"):
        _made(0.1, seed=1.5)


def test_what_it_says() -> None:
    monitor = Monitor(0.1)
    assert str(monitor) == "Nothing was checked yet; a mean loss of at most 0.1 is promised."
    assert math.isnan(monitor.mean)
    monitor.add_loss(0)
    assert str(monitor).startswith(
        "Nothing proves the promise broken so far: the mean loss was 0.0000 in 1 checked requests"
    )


@pytest.mark.parametrize(
    "settings", [{"loss": 0.0}, {"loss": 1}, {"loss": math.nan}, {"confidence": 1.0}, {"share": 0.0}, {"share": 1.5}]
)
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(FewerError, match=f"{next(iter(settings))}=.* is not in"):
        Monitor(**{"loss": 0.1, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan])
def test_a_loss_outside_0_to_1(loss: float) -> None:
    monitor = Monitor(0.1)
    with pytest.raises(FewerError, match=r"is not in \[0, 1\]"):
        monitor.add_loss(loss)
    assert monitor.checked == 0


@pytest.mark.parametrize("measure", [None, 5])
def test_a_measure_that_cannot_be_asked_is_refused(measure: Any) -> None:
    """It would fail at every check, which no answer suffers from, and never alarm."""
    with pytest.raises(FewerError, match=f"measure={measure} is neither the name of a loss nor a function"):
        _made(0.1, measure=measure)


@pytest.mark.parametrize("name", ["loss", "confidence", "share"])
def test_numbers_are_numbers(name: str) -> None:
    given: dict[str, Any] = {"loss": 0.1, name: "0.5"}
    with pytest.raises(FewerError, match=f"{name}='0.5' is not in"):
        _made(**given)


def _made(*args: Any, **given: Any) -> None:
    """As a user makes one: under test a check of types stands before it."""
    inspect.unwrap(Monitor.__init__)(object.__new__(Monitor), *args, **given)
