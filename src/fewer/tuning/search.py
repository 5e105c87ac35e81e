"""From many settings to a few that are worth a promise, and from those to one that has it.

race       all candidates on a few examples, those left on more: who would rarely have lost so much if its true
           loss were what is asked goes out, and who is dearer and no better than others
ladder     what is left, from the dearest to the cheapest: the order that promises are tested in
promise    calibration: the ladder from its safe end, until the first that does not pass
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from fewer.tuning import risk
from fewer.tuning.examples import Example, by_context
from fewer.tuning.hosts import Answer, Host
from fewer.tuning.journal import Journal
from fewer.tuning.losses import Loss, changed, lost
from fewer.tuning.result import Measured
from fewer.tuning.setting import Setting

Tick = Callable[[str, int, int], None]
"""Told what is being done, how many examples of it are done, and of how many."""
RARE = 0.05
"""A candidate goes out when a loss as large as its own would be rarer than this at the loss that is asked."""
LEFT = (16, 10)
"""Candidates left, at most, after the first and the second round."""
RUNGS = 8
"""Settings on the ladder, at most."""


@dataclass
class Bench:
    """A model, and everything it has said so far."""

    host: Host
    loss: Loss
    journal: Journal
    aim: str
    seconds: Callable[[Setting, Answer, Answer], float | None] = lambda setting, full, said: None
    tick: Tick = lambda what, done, of: None

    def ask(self, what: str, examples: Sequence[Example], settings: Sequence[Setting]) -> None:
        """See that every example was answered under every setting, and by the model as it is."""
        for done, example in enumerate(examples):
            self.tick(what, done, len(examples))
            self.one(example, settings)
        self.tick(what, len(examples), len(examples))

    def one(self, example: Example, settings: Sequence[Setting]) -> None:
        """The same for one example."""
        left = [one for one in (Setting(), *settings) if self.journal.get(example, one) is None]
        if left:
            for setting, answer in zip(left, self.host.ask(example, left), strict=True):
                self.journal.put(example, setting, answer)

    def answer(self, example: Example, setting: Setting) -> Answer:
        found = self.journal.get(example, setting)
        assert found is not None
        return found

    def lost(self, example: Example, setting: Setting, loss: Loss | None = None) -> float:
        """What one setting lost on one example; all, where it could not be met."""
        full, said = self.answer(example, Setting()), self.answer(example, setting)
        return 1.0 if said.refused else lost(loss or self.loss, full.text, said.text, example)

    def measured(self, setting: Setting, examples: Sequence[Example]) -> Measured:
        """The means over examples that were asked: over contexts, of the means over the questions about each."""
        contexts = by_context(examples)
        tasks: dict[str, list[float]] = defaultdict(list)
        for example in examples:
            tasks[example.task].append(self.lost(example, setting))

        def mean(of: Callable[[Example], float]) -> float:
            return fmean(fmean(map(of, group)) for group in contexts)

        took = {
            one.key: self.seconds(setting, self.answer(one, Setting()), self.answer(one, setting)) for one in examples
        }
        return Measured(
            setting,
            len(contexts),
            mean(lambda one: self.lost(one, setting)),
            mean(lambda one: self.answer(one, setting).bytes),
            mean(lambda one: self.answer(one, setting).tokens),
            None if None in took.values() else mean(lambda one: took[one.key] or 0.0),
            {task: fmean(values) for task, values in sorted(tasks.items()) if task},
        )

    def refused(self, setting: Setting, examples: Sequence[Example]) -> str:
        """Why a setting cannot be met on some example, if so."""
        return next((why for one in examples if (why := self.answer(one, setting).refused)), "")


def race(
    bench: Bench, settings: Sequence[Setting], examples: Sequence[Example], asked: float
) -> tuple[list[Measured], list[str]]:
    """The candidates that are left after all rounds, measured on all the examples; and what went out unasked for."""
    n, left, notes = len(examples), list(settings), []
    for turn, many in enumerate((min(n, max(8, n // 10)), min(n, max(24, n // 2)), n)):
        some = examples[:many]
        bench.ask(f"search, round {turn + 1} of 3, {len(left)} settings", some, left)
        for setting in list(left):
            if why := bench.refused(setting, some):
                left.remove(setting)
                notes.append(f"{setting} is left out: {why}")
        found = [bench.measured(setting, some) for setting in left]
        found = [one for one in found if plausible(one.loss, one.n, asked)]
        if turn < len(LEFT):
            found = best(found, bench.aim, LEFT[turn])
        left = [one.setting for one in found]
    return found, notes


def plausible(loss: float, n: int, asked: float) -> bool:
    """Whether a mean loss on n examples is not rare where the true one is what is asked.

    >>> plausible(0.125, 8, 0.02), plausible(0.25, 8, 0.02)
    (True, False)
    """
    return 1 - risk.below(math.floor(loss * n + 1e-9), n, asked) >= RARE


def best(found: Sequence[Measured], aim: str, many: int) -> list[Measured]:
    """So many settings: on each rung of cost the one that lost least, so that safe ones are there to be promised; and
    then those that no other beats in both loss and cost, those that only these beat, and so on."""
    rungs = banded(found, aim, max((one.cost(aim) for one in found), default=0.0))
    chosen = [min(rung, key=lambda one: (one.loss, one.cost(aim))) for rung in rungs][: many // 2]
    left = [one for one in found if one not in chosen]
    while left and len(chosen) < many:
        layer = frontier(left, aim)
        left = [one for one in left if one not in layer]
        chosen += layer
    return chosen[:many]


def banded(found: Sequence[Measured], aim: str, high: float) -> list[list[Measured]]:
    """Settings by their cost: at most `RUNGS` bands of equal width on a logarithmic scale up to `high`, dearest first;
    empty ones are left out, as is what costs nothing."""
    able = [one for one in found if 0 < one.cost(aim) <= high]
    if not able:
        return []
    low = min(one.cost(aim) for one in able)
    width = math.log(high / low) / RUNGS
    bands: dict[int, list[Measured]] = defaultdict(list)
    for one in able:
        bands[min(RUNGS - 1, int(math.log(one.cost(aim) / low) / width)) if width else 0].append(one)
    return [bands[band] for band in sorted(bands, reverse=True)]


def frontier(found: Sequence[Measured], aim: str) -> list[Measured]:
    """Those that no other beats in both loss and cost, the cheapest first; of equals the first."""
    line: list[Measured] = []
    for one in sorted(found, key=lambda one: (one.cost(aim), one.loss)):
        if not line or one.loss < line[-1].loss:
            line.append(one)
    return line


def ladder(bench: Bench, found: Sequence[Measured], full: Measured, examples: Sequence[Example]) -> list[Measured]:
    """At most so many rungs between the full cost and the cheapest: on each the setting that lost least there, and of
    those the one whose answers changed least. A rung that strains more than a cheaper one is left out: testing stops at
    the first that fails. What costs no less than the full model has no rung."""
    able = [one for one in found if one.cost(bench.aim) < full.cost(bench.aim)]

    def strain(one: Measured) -> tuple[float, float, float]:
        differs = fmean(bench.lost(example, one.setting, changed) for example in examples)
        return one.loss, differs, one.cost(bench.aim)

    steps: list[tuple[Measured, tuple[float, float, float]]] = []
    for rung in reversed(banded(able, bench.aim, full.cost(bench.aim))):  # from the cheapest
        one = min(rung, key=strain)
        if not steps or strain(one)[:2] <= steps[-1][1][:2]:
            steps.append((one, strain(one)))
    return [one for one, _ in reversed(steps)]


def promise(
    bench: Bench, rungs: Sequence[Measured], examples: Sequence[Example], asked: float, confidence: float
) -> tuple[list[Measured], int]:
    """The rungs on the calibration examples, each with its p-value, and how many pass from the safe end.

    Examples of one context stand and fall together, so a context counts once, with the mean of its losses. What has
    lost so much already that it cannot pass any more is asked no further, nor is what comes after it: testing stops
    there. Those have no p-value, and are measured on what they were asked; those that were not asked are left out.
    """
    settings, delta, contexts = [one.setting for one in rungs], 1 - confidence, by_context(examples)
    totals, asked_of, n = [0.0] * len(settings), [0] * len(settings), len(contexts)
    what = f"calibration, {len(settings)} settings"
    for done, group in enumerate(contexts):
        bench.tick(what, done, n)
        for example in group:
            bench.one(example, settings)
        for index, setting in enumerate(settings):
            totals[index] += fmean(bench.lost(example, setting) for example in group)
            asked_of[index] = done + 1
        over = [max(0.0, total - 1e-9) for total in totals[: len(settings)]]  # sums of floats may be off by a hair
        if dead := [i for i, total in enumerate(over) if risk.hopeless(total, n, asked, delta)]:
            settings = settings[: dead[0]]
        if not settings:
            break
    bench.tick(what, n, n)
    tested = []
    for index, rung in enumerate(rungs):
        some = [example for group in contexts[: asked_of[index]] for example in group]
        found = bench.measured(rung.setting, some)
        if index < len(settings):
            losses = [fmean(bench.lost(example, rung.setting) for example in group) for group in contexts]
            found = replace(found, p=risk.p_value(losses, asked))
        tested.append(found)
    passed = risk.fixed_sequence([one.p for one in tested if one.p is not None], delta)
    return tested, passed
