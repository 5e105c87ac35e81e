"""Searches over levels with one total: exact against every vector there is, total kept, never worse than the start."""

import random
from collections.abc import Callable
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.allocate import evolve as module
from fewer.allocate.evolve import Fitness, Vector, even, evolve, exhaustive, greedy
from fewer.types import BudgetError, FewerError
from tests.unit.test_types import unchecked

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def tangled(seed: int, places: int = 8, levels: int = 3) -> Fitness:
    """What each place loses, and what each pair loses together: nothing adds up."""
    chance = random.Random(seed)
    alone = [[chance.uniform(0, 1) for _ in range(levels)] for _ in range(places)]
    pairs = {
        (i, j): [[chance.uniform(-1, 1) for _ in range(levels)] for _ in range(levels)]
        for i in range(places)
        for j in range(i)
    }

    def fitness(v: Vector, stage: int) -> float:
        return sum(alone[i][v[i]] for i in range(places)) + sum(t[v[i]][v[j]] for (i, j), t in pairs.items())

    return fitness


def naive(total: int, most: list[int], weights: list[int], fitness: Fitness) -> tuple[float, Vector]:
    """Every vector, and then those with that total."""
    every = product(*[range(top + 1) for top in most])
    return min((fitness(v, 0), v) for v in every if sum(w * x for w, x in zip(weights, v, strict=True)) == total)


# --- exhaustive ---


@pytest.mark.parametrize("seed", range(4))
def test_exhaustive_is_the_best_of_all(seed: int) -> None:
    fitness, most, weights = tangled(seed, 5, 4), [3, 2, 0, 3, 1], [1, 2, 3, 2, 1]
    start = (1, 1, 0, 2, 1)
    found = exhaustive(start, most, fitness, weights=weights)
    assert (found.fitness, found.levels) == naive(8, most, weights, fitness)
    assert found.history == (fitness(start, 0), found.fitness)


def test_exhaustive_tries_each_vector_once() -> None:
    found = exhaustive(even(8, 8, 2), 2, tangled(0))
    assert found.evaluations == 1107  # the middle trinomial coefficient of 8


def test_exhaustive_refuses_what_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(levels: Vector, stage: int) -> float:
        raise AssertionError

    with pytest.raises(FewerError, match=r"28 places with levels up to 4 have more than 200,000 vectors"):
        exhaustive([2] * 28, 4, never)
    with pytest.raises(FewerError, match=r"use evolve or greedy"):  # powers of two: as many totals as vectors
        exhaustive([1] * 24, 1, never, weights=[2**i for i in range(24)])
    monkeypatch.setattr(module, "MOST_VECTORS", 1107)
    assert exhaustive(even(8, 8, 2), 2, tangled(0)).evaluations == 1107
    monkeypatch.setattr(module, "MOST_VECTORS", 1106)
    with pytest.raises(FewerError, match="more than 1,106"):
        exhaustive(even(8, 8, 2), 2, never)


# --- evolve ---


@pytest.mark.parametrize("seed", [0, 1, 4, 17])
def test_evolve_finds_the_best_of_8_places_with_3_levels(seed: int) -> None:
    fitness = tangled(seed)
    best = exhaustive(even(8, 8, 2), 2, fitness)
    found = evolve(even(8, 8, 2), 2, fitness, generations=400, offspring=32, survivors=[8, 2, 1], seed=seed)
    assert (found.levels, found.fitness) == (best.levels, best.fitness)
    assert found.history[0] == fitness(even(8, 8, 2), 2)
    assert all(b <= a for a, b in pairwise(found.history))
    assert len(found.history) == 401
    assert found.note == ""


def test_stages_grow_sharper() -> None:
    """Early stages see the fitness with noise, as a few examples would show it; the last one decides."""
    sharp = tangled(3)
    noise = random.Random(0)
    table: dict[tuple[Vector, int], float] = {}

    def blurred(v: Vector, stage: int) -> float:
        table[v, stage] = sharp(v, 2) + (noise.gauss(0, 0.3 / (stage + 1)) if stage < 2 else 0)
        return table[v, stage]

    found = evolve([1] * 8, 2, blurred, generations=60, offspring=32, survivors=[8, 4, 1])
    assert found.fitness == exhaustive([1] * 8, 2, sharp).fitness
    assert found.evaluations == len(table)
    assert sum(stage == 2 for _, stage in table) < sum(stage == 0 for _, stage in table)


@quick
@given(st.data())
def test_the_total_is_kept_and_the_start_never_beaten_by_worse(data: st.DataObject) -> None:
    places = data.draw(st.integers(1, 6))
    most = data.draw(st.lists(st.integers(0, 4), min_size=places, max_size=places))
    start = [data.draw(st.integers(0, top)) for top in most]
    weights = data.draw(st.lists(st.integers(1, 3), min_size=places, max_size=places))
    seed = data.draw(st.integers(0, 99))
    plain, seen = tangled(seed, places, 5), set()

    def fitness(v: Vector, stage: int) -> float:
        seen.add(v)
        return plain(v, stage)

    total = sum(w * x for w, x in zip(weights, start, strict=True))
    grown = evolve(start, most, fitness, generations=4, offspring=5, survivors=[2, 1], seed=seed, weights=weights)
    better = greedy(start, most, fitness, weights=weights)
    best = exhaustive(start, most, fitness, weights=weights)
    for v in seen:
        assert sum(w * x for w, x in zip(weights, v, strict=True)) == total
        assert all(0 <= x <= top for x, top in zip(v, most, strict=True))
    assert best.fitness <= grown.fitness <= plain(tuple(start), 0)
    assert best.fitness <= better.fitness <= plain(tuple(start), 0)


def test_the_same_seed_finds_the_same_and_another_goes_another_way() -> None:
    def run(seed: int) -> tuple[module.Found, list[Vector]]:
        asked: list[Vector] = []
        fitness = tangled(1)

        def told(v: Vector, stage: int) -> float:
            asked.append(v)
            return fitness(v, stage)

        return evolve([1] * 8, 2, told, generations=5, offspring=8, survivors=[3, 1], seed=seed), asked

    assert run(7) == run(7)
    assert run(7)[1] != run(8)[1]


def test_places_of_different_weight_switch_as_many_levels_as_keep_the_total() -> None:
    """Two levels of the light place for one of the heavy one; all is worth most in the heavy one."""
    found = evolve([4, 1], 4, lambda v, stage: -v[1], generations=5, offspring=4, survivors=[1], weights=[1, 2])
    assert found.levels == (0, 3)
    assert greedy([4, 1], 4, lambda v, stage: -v[1], weights=[10, 20]).levels == (0, 3)  # only their ratio counts


def test_of_equals_the_new_one_is_taken() -> None:
    """On a plain the search walks on, and so may come to where it goes down; greedy stays."""
    found = evolve([1] * 8, 2, lambda v, stage: 1.0, generations=1, offspring=4, survivors=[1])
    assert found.levels != (1,) * 8
    assert greedy([1] * 8, 2, lambda v, stage: 1.0).levels == (1,) * 8


def test_nothing_to_switch() -> None:
    for start, most, weights in (([2, 2], 2, None), ([0, 0], 3, None), ([1], 3, None), ([1, 1], 2, [1, 5])):
        for found in (
            evolve(start, most, lambda v, stage: 1.0, generations=3, offspring=2, survivors=[1], weights=weights),
            greedy(start, most, lambda v, stage: 1.0, weights=weights),
        ):
            assert found.levels == tuple(start)
            assert (found.history, found.evaluations) == ((1.0,), 1)
            assert "no place can give a level to another" in found.note


def test_few_within_reach() -> None:
    """Of the three vectors of this total, two are offspring, though sixteen were asked for."""
    found = evolve([1, 1], 2, lambda v, stage: abs(v[0] - 2), generations=2, offspring=16, survivors=[8, 1])
    assert (found.levels, found.fitness) == ((2, 0), 0)


def test_what_is_known_is_not_asked_again() -> None:
    asked: list[tuple[Vector, int]] = []
    plain, known = tangled(2), dict[tuple[Vector, int], float]()

    def fitness(v: Vector, stage: int) -> float:
        asked.append((v, stage))
        return plain(v, stage)

    def run(generations: int) -> module.Found:
        return evolve([1] * 8, 2, fitness, generations=generations, offspring=8, survivors=[2, 1], known=known)

    run(3)  # broken off
    resumed = run(10)
    assert len(asked) == len(set(asked)) == len(known)
    assert 0 < resumed.evaluations < len(asked)
    again = evolve([1] * 8, 2, plain, generations=10, offspring=8, survivors=[2, 1])
    assert (again.levels, again.history) == (resumed.levels, resumed.history)
    assert again.evaluations == len(asked)


def test_ticks() -> None:
    ticks: list[tuple[int, float]] = []
    found = evolve(
        [1] * 8, 2, tangled(0), generations=4, offspring=4, survivors=[1], tick=lambda n, best: ticks.append((n, best))
    )
    assert ticks == list(enumerate(found.history[1:], 1))
    ticks.clear()
    found = greedy([1] * 8, 2, tangled(0), tick=lambda n, best: ticks.append((n, best)))
    assert ticks == list(enumerate(found.history[1:], 1))


# --- greedy, even ---


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_exact_where_losses_are_convex_and_add_up(seed: int) -> None:
    chance = random.Random(seed)
    steps = [sorted(chance.uniform(-1, 0) for _ in range(3)) for _ in range(6)]  # what each further level saves

    def convex(v: Vector, stage: int) -> float:
        return sum(sum(saves[:level]) for saves, level in zip(steps, v, strict=True))

    start = even(9, 6, 3)
    found = greedy(start, 3, convex)
    assert found.fitness == pytest.approx(exhaustive(start, 3, convex).fitness)
    assert all(b < a for a, b in pairwise(found.history))


def test_greedy_can_be_caught_where_they_do_not() -> None:
    """Both last places have to give before the first gets anything from it."""
    worth = {(2, 0, 0): -3.0, (0, 1, 1): -1.0}
    fitness: Callable[[Vector, int], float] = lambda v, stage: worth.get(v, 0.0)  # noqa: E731
    assert greedy((0, 1, 1), 2, fitness).levels == (0, 1, 1)
    assert evolve((0, 1, 1), 2, fitness, generations=5, offspring=5, survivors=[1]).levels == (2, 0, 0)


def test_even() -> None:
    assert even(0, 3, 2) == (0, 0, 0)
    assert even(6, 3, 2) == (2, 2, 2)
    assert even(5, 3, 2) == (2, 2, 1)
    assert even(8, 3, [1, 3, 9]) == (1, 3, 4)
    for total in (-1, 7):
        with pytest.raises(BudgetError, match="cannot be shared among 3 places that hold 0 to 6"):
            even(total, 3, 2)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"start": [3, 0]}, "level 3 at place 0 is no whole number from 0 to 2"),
        ({"start": [-1, 3]}, "level -1 at place 0"),
        ({"start": []}, "each of the 0 places"),
        ({"most": [2]}, "each of the 2 places"),
        ({"most": -1}, "from 0 on"),
        ({"weights": [1]}, "each of the 2 places"),
        ({"weights": [1, 0]}, "whole number from 1 on"),
        ({"generations": -1}, "generations=-1: give a whole number, 0 or more"),
        ({"offspring": 0}, "offspring=0: give a whole number, 1 or more"),
        ({"switches": 0}, "switches=0: give a whole number, 1 or more"),
        ({"survivors": []}, "survivors"),
        ({"survivors": [2]}, "survivors"),
        ({"survivors": [1, 2, 1]}, "survivors"),
        ({"fitness": lambda v, stage: float("nan")}, "is nan"),
    ],
)
def test_bad_input(change: dict[str, object], said: str) -> None:
    good = {
        "start": [1, 1],
        "most": 2,
        "fitness": lambda v, stage: 0.0,
        "generations": 1,
        "offspring": 2,
        "survivors": [1],
    }
    with pytest.raises(FewerError, match=said):
        evolve(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"start": 5}, "start=5: give a list"),
        ({"start": [0.5, 1]}, "level 0.5 at place 0 is no whole number"),
        ({"most": 3.5}, "most=3.5: give the highest level"),
        ({"most": [2, 1.5]}, r"most=\[2, 1.5\]"),
        ({"weights": [1, 0.5]}, "whole number from 1 on"),
        ({"generations": 2.5}, "generations=2.5: give a whole number"),
        ({"offspring": "4"}, "offspring='4': give a whole number"),
        ({"survivors": 1}, "survivors=1"),
        ({"survivors": [1.0]}, r"survivors=\[1.0\]"),
    ],
)
def test_what_is_no_whole_number(change: dict[str, object], said: str) -> None:
    fresh = unchecked(module)
    good = {"start": [1, 1], "most": 2, "generations": 1, "offspring": 2, "survivors": [1]}
    with pytest.raises(FewerError, match=said):
        fresh.evolve(**{**good, **change}, fitness=lambda v, stage: 0.0)


def test_what_must_not_be_chosen_is_worth_inf() -> None:
    found = evolve(
        [1, 1], 2, lambda v, stage: float("inf") if v[0] < 2 else 1.0, generations=3, offspring=4, survivors=[1]
    )
    assert found.levels == (2, 0)
