"""The knapsack against a search of all subsets, and beyond its limits."""

from itertools import combinations

import numpy as np
import pytest

from fewer.allocate import knapsack as module
from fewer.allocate.knapsack import knapsack


def best(value: list[float], weight: list[int], room: int) -> float:
    """What the best of all subsets is worth."""
    some = (s for n in range(len(value) + 1) for s in combinations(range(len(value)), n))
    return max(sum(value[i] for i in s) for s in some if sum(weight[i] for i in s) <= room)


def test_worth_as_much_as_the_best_of_all_subsets() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        n = int(rng.integers(1, 10))
        value, weight = rng.normal(size=n).round(2), rng.integers(0, 12, n)
        room = int(rng.integers(0, 40))
        taken = knapsack(value, weight, room)
        assert weight[taken].sum() <= room and (value[taken] > 0).all()
        assert value[taken].sum() == pytest.approx(max(best(value.tolist(), weight.tolist(), room), 0.0))


def test_greedy_beyond_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECES", 2)
    # by worth a unit of weight the first goes in, and only one of the others after it; 10 + 6 beats 6 + 6 no more
    assert knapsack([10.0, 6.0, 6.0], [5, 3, 3], 6).tolist() == [True, False, False]
    assert knapsack(np.ones(500), np.ones(500, dtype=np.int64), 7).sum() == 7


def test_nothing_fits() -> None:
    assert not knapsack([1.0, 2.0], [3, 4], 2).any()
    assert not knapsack([1.0, 2.0], [3, 4], -5).any()
    assert knapsack([], [], 5).shape == (0,)
    assert not knapsack([-1.0, 0.0], [0, 0], 5).any()
