"""Drift: does what was promised of a setting still hold on live requests?

A share of the requests is also answered by the uncompressed model, and the loss of each is bet on. The null is "the
mean loss is at most alpha, at every request, given those before". A bet of c gains where losses are above alpha:

    factor(x) = 1 + c (x - alpha) / alpha        of mean at most 1 under the null, never below 1 - c

Betting on means: Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting" (arXiv
2010.09686), here with a mixture of constant bets. Requests may be fine for months and then drift; what was lost in good
times would hide that, so a part w(s) = 1 / (s (s + 1)) of the money is kept for bets that begin at check s, after the
e-detectors of Shin, Ramdas and Rinaldo 2022 (arXiv 2203.03532). Wealth that begins with 1 and is not expected to grow
under the null reaches 1 / (1 - confidence) with a chance of at most 1 - confidence (Ville), over all time and however
often one looks. That is the alarm.
"""

import logging
import math
import random
import threading
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from fewer.tuning.examples import Example
from fewer.tuning.losses import OWN, resolve_loss
from fewer.types import FewerError

BETS = tuple(2.0**-k for k in range(1, 8))
"""Shares c of the most that may be bet; the best one for 0-1 losses of mean q is (q - alpha) / (1 - alpha)."""

Measure = Callable[[str, str], float | int]
log = logging.getLogger("fewer.monitor")


class Monitor:
    """Compares a sample of live requests with the uncompressed answer. May be shared by threads.

        monitor = fewer.Monitor(loss=0.02)
        answer = monitor.watch(lambda: ask(short), lambda: ask(prompt))
        if not monitor.holds: ...

    Args:
        loss: the mean loss that was promised, in (0, 1).
        confidence: the chance that no alarm is ever false is at least this, in (0, 1).
        share: of the requests that are checked, in (0, 1]. Each costs an uncompressed answer.
        seed: which requests are checked, by their number.
        measure: how much worse the compressed answer is, in [0, 1]: a function of the full and the compressed answer,
            or a name in `fewer.tuning.losses.LOSSES`.

    Raises:
        FewerError: a number is out of its range, or the measure needs right answers, which live requests lack.
        UnknownName: no measure has that name.

    >>> monitor = Monitor(loss=0.1, measure=lambda full, said: float(full != said))
    >>> monitor.add("42", "42"), monitor.add("Paris", "Rome"), monitor.add("7", "eight")
    (True, True, True)
    >>> print(monitor)  # doctest: +NORMALIZE_WHITESPACE
    Nothing proves the promise broken so far: the mean loss was 0.6667 in 3 checked requests, and at most 0.1 is
    promised.
    >>> while monitor.add("yes", "no"): pass
    >>> print(monitor)
    The promise is broken, with confidence 0.95: by check 5 the mean loss had risen above 0.1. It was 0.8000 in all 5.
    """

    def __init__(
        self,
        loss: float | int,
        confidence: float | int = 0.95,
        share: float | int = 0.05,
        seed: int = 0,
        measure: Measure | str = "changed",
    ) -> None:
        for name, value in (("loss", loss), ("confidence", confidence), ("share", share)):
            # nan fails this too
            if not (isinstance(value, Real) and (0 < value < 1 or (name == "share" and value == 1))):
                raise FewerError(f"Monitor: {name}={value!r} is not in (0, 1{']' if name == 'share' else ')'}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise FewerError(f"Monitor: seed={seed!r} is no whole number")
        self.loss, self.confidence, self.share, self.seed = float(loss), float(confidence), float(share), seed
        self.named = measure if isinstance(measure, str) else None
        self.measure = _measure(measure) if isinstance(measure, str) else measure
        if not callable(self.measure):
            raise FewerError(
                f"Monitor: measure={measure!r} is neither the name of a loss nor a function of the full and the "
                f"compressed answer"
            )
        self.note = ""
        self.drawn = self.checked = self.failed = 0
        self.total = 0.0
        self.broken_at: int | None = None
        self._stakes = [0.0] * len(BETS)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, plan: Any, **settings: Any) -> "Monitor":
        """A monitor of what a plan promises: its loss, confidence and measure; `settings` as for `Monitor`, instead.

        Where the promise is of wrong answers, which only examples can tell, changed ones are counted, and `note` says
        so. Many of those are still right, so the alarm may come although the promise holds. `note` says so too where
        the promise counts a context with several questions once: to hold it to that, give `add_loss` their mean.
        """
        promise = getattr(plan, "promise", None)
        if promise is None:
            raise FewerError(
                f"Monitor.of({plan!r}): give a plan with a promise, such as TunedPlan.load('plan.toml'); without one, "
                f"say what is promised: Monitor(loss=0.02)"
            )
        given = {"loss": promise.loss, "confidence": promise.confidence, "measure": promise.measure, **settings}
        if isinstance(given["measure"], str) and given["measure"].startswith(OWN):
            raise FewerError(
                f"Monitor.of: the promise is of a loss of your own, {given['measure'].removeprefix(OWN)!r}; give a "
                "function of both answers as measure="
            )
        counted = given["measure"] == "wrong" and "measure" not in settings
        made = cls(**{**given, "measure": "changed"} if counted else given)
        notes = [
            "The promise is of wrong answers; here changed ones are counted, right or not, since no right answers are "
            "known of live requests."
        ] * counted
        notes += ["The promise counts a context with several questions once; here every request counts."] * getattr(
            promise, "grouped", False
        )
        made.note = " ".join(notes)
        return made

    @property
    def holds(self) -> bool:
        """False from the alarm on."""
        return self.broken_at is None

    @property
    def mean(self) -> float:
        """The mean loss of all that was checked, nan before the first."""
        with self._lock:
            return self.total / self.checked if self.checked else math.nan

    @property
    def wealth(self) -> float:
        """What the bets are worth, 1 at the start; the alarm is at 1 / (1 - confidence), and betting ends there."""
        with self._lock:
            return self._wealth()

    def draw(self) -> bool:
        """Whether to check this request: the n-th one of a seed is drawn or not, whatever it holds."""
        with self._lock:
            self.drawn += 1
            return random.Random(f"{self.seed}/{self.drawn}").random() < self.share

    def add(self, full: str, compressed: str) -> bool:
        """Count the loss of a compressed answer beside the full one; whether the promise holds."""
        return self.add_loss(float(self.measure(full, compressed)))  # numpy's own would not go into JSON

    def add_loss(self, loss: float | int) -> bool:
        """Count one loss in [0, 1]; whether the promise holds."""
        if not (isinstance(loss, Real) and 0 <= loss <= 1):
            raise FewerError(f"Monitor: the loss {loss!r} is not in [0, 1]")
        loss = float(loss)
        with self._lock:
            self.checked += 1
            self.total += loss
            if self.broken_at is None:
                begun = 1 / (self.checked * (self.checked + 1))
                gain = (loss - self.loss) / self.loss
                self._stakes = [(s + begun) * (1 + bet * gain) for s, bet in zip(self._stakes, BETS, strict=True)]
                if self._wealth() >= 1 / (1 - self.confidence):
                    self.broken_at = self.checked
            return self.broken_at is None

    def watch(self, ask_compressed: Callable[[], str], ask_full: Callable[[], str]) -> str:
        """The compressed answer, always; where the request is drawn, the full model is asked too, and the loss counted.

        What `ask_compressed` raises goes up. What the check raises does not, since the answer is there: the type of it
        is logged to "fewer.monitor", without its words, which may quote a prompt, and `failed` counts it. Requests
        whose check failed are not among the checked; if it is the hard ones that fail, the mean is too low.
        """
        answer = ask_compressed()
        if self.draw():
            try:
                self.add(ask_full(), answer)
            except Exception as why:  # noqa: BLE001  # whatever a model or a measure raises
                with self._lock:
                    self.failed += 1
                log.error("a check failed with %s", type(why).__name__)
        return answer

    def state(self) -> dict[str, Any]:
        """All that `resume` needs, ready for JSON. A measure that is a function is not in it."""
        with self._lock:
            return {**{name: getattr(self, name) for name in _STATE}, "stakes": list(self._stakes)}

    @classmethod
    def resume(cls, state: Mapping[str, Any], measure: Measure | None = None) -> "Monitor":
        """The monitor that `state` was taken of.

        Args:
            measure: the function it was made with; left out where it was a name.

        Raises:
            FewerError: the state is none, or was changed into nonsense.
        """
        _check(state)
        if (state["named"] is None) == (measure is None):
            said = "its own function; give measure=" if measure is None else f"{state['named']!r}; leave measure out"
            raise FewerError(f"Monitor.resume: this monitor measured with {said}")
        made = cls(state["loss"], state["confidence"], state["share"], state["seed"], measure or state["named"])
        for name in ("note", "drawn", "checked", "failed", "total", "broken_at"):
            setattr(made, name, state[name])
        made._stakes = [float(one) for one in state["stakes"]]
        if (made._wealth() < 1 / (1 - made.confidence)) != made.holds:
            raise FewerError("Monitor.resume: the state's stakes do not fit its alarm; it was changed by hand")
        return made

    def __str__(self) -> str:
        if not self.checked:
            said = f"Nothing was checked yet; a mean loss of at most {self.loss:g} is promised."
        elif self.broken_at is None:
            said = (
                f"Nothing proves the promise broken so far: the mean loss was {self.mean:.4f} in {self.checked:,} "
                f"checked requests, and at most {self.loss:g} is promised."
            )
        else:
            said = (
                f"The promise is broken, with confidence {self.confidence:g}: by check {self.broken_at:,} the mean "
                f"loss had risen above {self.loss:g}. It was {self.mean:.4f} in all {self.checked:,}."
            )
        failed = f" {self.failed:,} checks failed." if self.failed else ""
        return said + failed + (f" {self.note}" if self.note else "")

    def _wealth(self) -> float:
        bets = self.checked if self.broken_at is None else self.broken_at
        return sum(self._stakes) / len(BETS) + 1 / (bets + 1)


_STATE: dict[str, tuple[type, ...]] = {
    "loss": (float, int), "confidence": (float, int), "share": (float, int), "seed": (int,), "named": (str, type(None)),
    "note": (str,), "drawn": (int,), "checked": (int,), "failed": (int,), "total": (float, int),
    "broken_at": (int, type(None)),
}  # fmt: skip


def _check(state: Mapping[str, Any]) -> None:
    """Raise unless this is what `Monitor.state` writes, as far as its parts show."""
    if not isinstance(state, Mapping) or {*_STATE, "stakes"} != set(state):
        raise FewerError(f"Monitor.resume: this is no state, which has {', '.join(_STATE)} and stakes")
    for name, kinds in _STATE.items():
        if isinstance(state[name], bool) or not isinstance(state[name], kinds):
            raise FewerError(f"Monitor.resume: {name}={state[name]!r} cannot be read")
    checked, at, stakes = state["checked"], state["broken_at"], state["stakes"]
    counts = min(state["drawn"], checked, state["failed"]) >= 0 and (at is None or 1 <= at <= checked)
    if not (counts and 0 <= state["total"] <= checked):
        raise FewerError("Monitor.resume: the state's counts do not fit one another; it was changed by hand")
    numbers = isinstance(stakes, list) and all(isinstance(one, (int, float)) and 0 <= one < math.inf for one in stakes)
    if not numbers or len(stakes) != len(BETS):
        raise FewerError(f"Monitor.resume: stakes={stakes!r}; they are {len(BETS)} numbers from 0 on")


def _measure(name: str) -> Measure:
    if name == "wrong":
        raise FewerError("Monitor: measure='wrong' needs right answers, which live requests lack; use 'changed'")
    loss, request = resolve_loss(name), Example("", "")
    return lambda full, said: float(loss(full, said, request))
