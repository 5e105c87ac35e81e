"""Schedules: the way to a share, with the numbers worked out by hand."""

import pytest

from fewer.allocate.schedule import MOST_HALVED, SHAPES, Schedule, halved
from fewer.types import BudgetError


def counts(schedule: Schedule, n: int, places: int, protected: int = 0, **more: object) -> list[int]:
    budgets = schedule.budgets(range(places), places, protected, **more)  # type: ignore[arg-type]
    return [budgets[i].count(n + protected) for i in range(places)]


def test_constant_lets_as_many_go_at_each_place() -> None:
    """100 tokens down to 40 at 4 places: 15 go at each."""
    assert counts(Schedule(0.4), 100, 4) == [85, 70, 55, 40]


def test_linear_lets_fewer_go_at_each_place_and_none_at_the_last() -> None:
    """60 of 100 go at 4 places in the proportion 3 : 2 : 1 : 0, so 30, 20, 10 and none."""
    assert counts(Schedule(0.4, "linear"), 100, 4) == [70, 50, 40, 40]


def test_tomes_linear_schedule() -> None:
    """(13, -1) on 12 layers of 197 tokens is 26, 23, 21, 18, ..., 2, 0 in the authors' code, 154 in all; ours lets the
    same number go in the same proportion, rounded the library's one way."""
    n = 196
    left = counts(Schedule((n - 154) / n, "linear"), n, 12)
    gone = [a - b for a, b in zip([n, *left], left, strict=False)]
    assert sum(gone) == 154
    assert all(abs(a - b) <= 1.5 for a, b in zip(gone, [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0], strict=True))


def test_geometric_keeps_the_same_share_at_each_place() -> None:
    """EViT's 0.7 at three places leaves 0.343."""
    assert counts(Schedule(0.7**3, "geometric"), 1000, 3) == [700, 490, 343]


def test_protected_tokens_come_on_top() -> None:
    assert counts(Schedule(0.5), 100, 2, protected=5) == [80, 55]
    assert counts(Schedule([60, 30]), 100, 2, protected=5) == [65, 35]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [7, 196, 1369])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.11])
def test_the_end_is_exact_and_nothing_comes_back(shape: str, n: int, keep: float) -> None:
    left = counts(Schedule(keep, shape), n, 12)
    assert left == sorted(left, reverse=True)
    assert left[-1] == -int(-(keep * n - 1e-9) // 1)


def test_where_pairs_join_earlier_places_take_over() -> None:
    """0.1 at 4 places: constant would go 0.775, 0.55, 0.325, 0.1, and nobody can go from 0.325 to 0.1 in pairs."""
    shares = halved(Schedule(0.1).shares(4), 0.1)
    assert shares == pytest.approx((0.6859, 0.361, 0.19, 0.1), abs=1e-4)
    assert all(b >= a / MOST_HALVED - 1e-9 for a, b in zip((1.0, *shares), shares, strict=False))


def test_where_pairs_cannot_do_it_that_is_said() -> None:
    with pytest.raises(BudgetError, match=r"at least 0\.28"):
        counts(Schedule(0.2), 100, 2, halves=True)


def test_flops_are_solved_for() -> None:
    """Where the cost is the mean share: 0.8 and 0.6 are the constant schedule of two places whose mean is 0.7."""
    schedule = Schedule("0.7 flops")
    budgets = schedule.budgets(range(2), 2, 0, cost=lambda shares: sum(shares) / 2)
    assert [budgets[i].fraction for i in range(2)] == pytest.approx([0.8, 0.6], abs=1e-6)


@pytest.mark.parametrize("text", ["0.6 flops", "60% FLOPs", ".6flops"])
def test_flops_are_read(text: str) -> None:
    assert Schedule(text).flops == pytest.approx(0.6)


def test_lists_may_be_as_long_as_the_places_or_the_blocks() -> None:
    budgets = Schedule([0.5, 0.25]).budgets([3, 7], 12, 1)
    assert sorted(budgets) == [3, 7]
    budgets = Schedule([0.5] * 12).budgets([3, 7], 12, 1)
    assert sorted(budgets) == list(range(12))
    with pytest.raises(BudgetError, match="each of the 12 blocks, or for each of the 2"):
        Schedule([0.5] * 3).budgets([3, 7], 12, 1)
