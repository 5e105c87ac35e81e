"""Which level each place gets, of all ways to share one total: layers, heads or stages that are worth more get more.

A level is a whole number from 0 to the place's `most`; what it stands for (a share, bits, a codec) is the caller's.
The `fitness` of a vector of levels is asked for, lower is better; nothing is assumed of it, since errors of layers do
not add up. Three searches over the same space, all keeping the total exactly:

    evolve      EvoPress (Sieberling, Kuznedelev, Kurtic, Alistarh, ICML 2025, arXiv 2410.14649): of one parent,
                offspring that differ by a few level switches, one place down and another up; judged in stages on
                growing data, ever fewer of them; the best of the last stage and the parent is the next parent.
                How many switches is drawn as in the authors' evo_quant_search.py (3d16ee6)
    greedy      the best single switch, again and again
    exhaustive  every vector there is

Differs from the paper: a stage's data are the same in every generation, so that what was measured once is not measured
again, and a search that was broken off can take up what it knows; vectors not tried yet go first, and where generations
bring nothing better, offspring may be further away, so that a long search of a small space ends at its best; places of
different weight also switch, by as many levels as keep the total exact, where the authors switch within groups of one
size or let the total fall short.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from numbers import Integral
from typing import Any, TypeGuard

from fewer.types import Budget, BudgetError, FewerError

Vector = tuple[int, ...]
"""One level for each place."""
Fitness = Callable[[Vector, int], float | int]
"""What a vector loses, on the data of a stage; lower is better."""
Known = MutableMapping[tuple[Vector, int], float]
Tick = Callable[[int, float], object]
"""Told after each generation, or round: how many are done, and the best fitness so far."""

PATIENCE = 5
"""After so many generations without a better parent, offspring may be one switch further away."""

MOST_VECTORS = 200_000
"""As many as `exhaustive` will try."""


@dataclass(frozen=True)
class Found:
    """The best vector and its `fitness` on the last stage's data.

    `history` is the fitness of the start and after each generation, `evaluations` how often the fitness was asked for.
    `note` says why there was nothing to search, where that is so.
    """

    levels: Vector
    fitness: float
    history: tuple[float, ...]
    evaluations: int
    note: str = ""


def even(total: int, places: int, most: int | Sequence[int]) -> Vector:
    """`total` shared as evenly as can be; what does not divide goes to the first places.

    >>> even(7, 4, 3), even(7, 3, [1, 9, 9])
    ((2, 2, 2, 1), (1, 3, 3))
    """
    tops = _tops(most, places)
    if not _whole(total) or not 0 <= total <= sum(tops):
        raise BudgetError(f"even: {total} levels cannot be shared among {places} places that hold 0 to {sum(tops)}")
    return tuple(Budget.split(total, [1.0] * places, tops))


def evolve(
    start: Sequence[int],
    most: int | Sequence[int],
    fitness: Fitness,
    *,
    generations: int,
    offspring: int,
    survivors: Sequence[int],
    seed: int = 0,
    switches: int = 3,
    weights: Sequence[int] | None = None,
    known: Known | None = None,
    tick: Tick | None = None,
) -> Found:
    """Evolutionary search with staged selection; never worse than `start` on the last stage's data.

    Args:
        start: the first parent, `(places,)`; its total is what is kept.
        most: the highest level of every place, or of each.
        fitness: of `(levels, stage)`; the same each time it is asked. Of equals the new one is taken, so that the
            search can cross a plain; inf marks what must not be chosen.
        offspring: different vectors in each generation, or as many as were found within reach.
        survivors: how many are left after each stage, the last being 1; the paper has 8, 2, 1 of 64 offspring.
        switches: the most switches between parent and offspring, at first; fewer are more likely.
        weights: what a level costs at each place, whole numbers; default 1 everywhere.
        known: fitnesses that are known already; new ones are added as they come.

    Raises:
        BudgetError: a level is outside its place's range, or lists differ in length.
        FewerError: another argument is out of range, or a fitness is nan.
    """
    space = _Space.of(start, most, weights)
    for name, value in (("generations", generations), ("offspring", offspring), ("switches", switches)):
        least = 0 if name == "generations" else 1
        if not _whole(value) or value < least:
            raise FewerError(f"evolve: {name}={value!r}: give a whole number, {least} or more")
    stages = _listed(survivors)
    if not stages or stages[-1] != 1 or sorted(stages, reverse=True) != stages:
        raise FewerError(f"evolve: survivors={survivors!r}: give one number a stage, none above the one before, 1 last")
    judge, chance, last = _Judge(fitness, known), random.Random(seed), len(stages) - 1
    parent = tuple(start)
    history = [judge(parent, last)]
    if not any(space.neighbours(parent)):
        return Found(parent, history[0], tuple(history), judge.asked, space.stuck)
    tried, stale = {parent}, 0  # and the generations since the last improvement
    for generation in range(generations):
        born: dict[Vector, None] = {}  # in the order they came
        again: dict[Vector, None] = {}
        reach = max(switches, min(switches + stale // PATIENCE, len(parent)))
        for _ in range(4 * offspring):  # where few are within reach, most draws repeat one
            child = space.mutant(parent, chance, min(chance.randint(1, reach), chance.randint(1, reach)))
            if child and child != parent:
                (again if child in tried else born)[child] = None
            if len(born) == offspring:
                break
        left = [*born, *again][:offspring]
        tried.update(left)
        for stage, many in enumerate(stages):
            if stage == last:
                left = [*left, parent]  # after the others: of equals the new one is taken
            left = sorted(left, key=lambda levels, stage=stage: judge(levels, stage))[:many]  # type: ignore[misc]
        parent = left[0]
        history.append(judge(parent, last))
        stale = 0 if history[-1] < history[-2] else stale + 1
        if tick is not None:
            tick(generation + 1, history[-1])
    return Found(parent, history[-1], tuple(history), judge.asked)


def greedy(
    start: Sequence[int],
    most: int | Sequence[int],
    fitness: Fitness,
    *,
    stage: int = 0,
    weights: Sequence[int] | None = None,
    known: Known | None = None,
    tick: Tick | None = None,
) -> Found:
    """The best single switch, until none is better: `places * (places - 1)` evaluations for each. Exact where the
    fitness is a sum of convex functions, one for each place, and all weights are equal. Arguments as for `evolve`."""
    space, judge = _Space.of(start, most, weights), _Judge(fitness, known)
    now = tuple(start)
    history = [judge(now, stage)]
    if not any(space.neighbours(now)):
        return Found(now, history[0], tuple(history), judge.asked, space.stuck)
    while True:
        best = min(space.neighbours(now), key=lambda levels: judge(levels, stage), default=now)
        if not judge(best, stage) < history[-1]:
            return Found(now, history[-1], tuple(history), judge.asked)
        now = best
        history.append(judge(now, stage))
        if tick is not None:
            tick(len(history) - 1, history[-1])


def exhaustive(
    start: Sequence[int],
    most: int | Sequence[int],
    fitness: Fitness,
    *,
    stage: int = 0,
    weights: Sequence[int] | None = None,
    known: Known | None = None,
) -> Found:
    """The best of all vectors with the total of `start`; of equals the one that comes first in order.

    Raises:
        FewerError: there are more than `MOST_VECTORS`.
    """
    space, judge = _Space.of(start, most, weights), _Judge(fitness, known)
    every = space.every(tuple(start))
    first = judge(tuple(start), stage)
    best = min(every, key=lambda levels: judge(levels, stage))
    return Found(best, judge(best, stage), (first, judge(best, stage)), judge.asked)


class _Judge:
    """A fitness that is asked once for each vector and stage."""

    def __init__(self, fitness: Fitness, known: Known | None) -> None:
        self.fitness, self.asked = fitness, 0
        self.known: Known = {} if known is None else known

    def __call__(self, levels: Vector, stage: int) -> float:
        if (levels, stage) not in self.known:
            value = float(self.fitness(levels, stage))
            if math.isnan(value):
                raise FewerError(f"the fitness of {levels} at stage {stage} is nan; a setting that fails is worth inf")
            self.asked += 1
            self.known[levels, stage] = value
        return self.known[levels, stage]


@dataclass(frozen=True)
class _Space:
    """All vectors with one total, and how to get from one to the next."""

    tops: Vector
    weights: Vector

    @classmethod
    def of(cls, start: Sequence[int], most: int | Sequence[int], weights: Sequence[int] | None) -> "_Space":
        if not isinstance(start, Sequence):
            raise BudgetError(f"start={start!r}: give a list, one level for each place")
        tops, heavy = _tops(most, len(start)), tuple([1] * len(start) if weights is None else _listed(weights))
        if len(heavy) != len(start) or any(weight < 1 for weight in heavy):
            raise BudgetError(f"weights={weights!r}: one whole number from 1 on for each of the {len(start)} places")
        for place, (level, top) in enumerate(zip(start, tops, strict=True)):
            if not _whole(level) or not 0 <= level <= top:
                raise BudgetError(f"start: level {level!r} at place {place} is no whole number from 0 to {top}")
        shared = math.gcd(*heavy)
        return cls(tuple(tops), tuple(weight // shared for weight in heavy))

    @property
    def stuck(self) -> str:
        """Why there is nothing to search."""
        return f"no place can give a level to another: levels go up to {list(self.tops)} and weigh {list(self.weights)}"

    @cached_property
    def trades(self) -> list[list[tuple[int, int]]]:
        """How many levels `trades[down][up]` a place gives and another gets: one each where their weights are equal."""
        return [[(b // math.gcd(a, b), a // math.gcd(a, b)) for b in self.weights] for a in self.weights]

    def switched(self, levels: Vector, down: int, up: int) -> Vector | None:
        """The vector after one switch, or None where it cannot be."""
        given, got = self.trades[down][up]
        if down == up or levels[down] < given or levels[up] + got > self.tops[up]:
            return None
        out = list(levels)
        out[down] -= given
        out[up] += got
        return tuple(out)

    def neighbours(self, levels: Vector) -> Iterator[Vector]:
        """All vectors one switch away."""
        pairs = product(range(len(levels)), repeat=2)
        return (found for down, up in pairs if (found := self.switched(levels, down, up)))

    def mutant(self, levels: Vector, chance: random.Random, switches: int) -> Vector | None:
        """So many random switches away, which may lead back; None where there is none to make."""
        out, places = list(levels), len(levels)
        for _ in range(switches):
            for _ in range(4 * places):
                down, up = int(chance.random() * places), int(chance.random() * places)
                given, got = self.trades[down][up]
                if down != up and out[down] >= given and out[up] + got <= self.tops[up]:
                    out[down] -= given
                    out[up] += got
                    break
            else:  # few ways or none: look at all
                ways = list(self.neighbours(tuple(out)))
                if not ways:
                    return None
                out = list(chance.choice(ways))
        return tuple(out)

    def every(self, start: Vector) -> list[Vector]:
        """All vectors with the total of `start`, in order."""
        total = sum(weight * level for weight, level in zip(self.weights, start, strict=True))
        ways = [Counter({0: 1})]  # of the last 0, 1, ... places: how many vectors have each total
        for top, weight in zip(reversed(self.tops), reversed(self.weights), strict=True):
            sums: Counter[int] = Counter()
            for level in range(top + 1):
                for rest, many in ways[-1].items():
                    if rest + level * weight <= total:
                        sums[rest + level * weight] += many
            ways.append(sums)
            if len(sums) > MOST_VECTORS:
                break
        if len(ways) <= len(start) or ways[-1][total] > MOST_VECTORS:
            raise FewerError(
                f"exhaustive: {len(start)} places with levels up to {max(self.tops)} have more than {MOST_VECTORS:,} "
                f"vectors of this total; use evolve or greedy, or fewer levels"
            )
        found: list[tuple[Vector, int]] = [((), total)]
        for place, (top, weight) in enumerate(zip(self.tops, self.weights, strict=True)):
            after = ways[len(start) - place - 1]
            found = [
                ((*head, level), left - level * weight)
                for head, left in found
                for level in range(top + 1)
                if after[left - level * weight]
            ]
        return [head for head, _ in found]


def _tops(most: int | Sequence[int], places: int) -> list[int]:
    tops = [most] * places if _whole(most) else _listed(most)
    if not places or len(tops) != places or any(top < 0 for top in tops):
        raise BudgetError(f"most={most!r}: give the highest level, from 0 on, or one for each of the {places} places")
    return tops


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral)


def _listed(values: Any) -> list[int]:
    """Whole numbers as a list; none where they are anything else."""
    return list(values) if isinstance(values, Sequence) and all(map(_whole, values)) else []
