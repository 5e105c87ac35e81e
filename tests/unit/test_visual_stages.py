"""Budgets over the cuts of a vision-language model: exact at the end, on the way, and on average."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewer.adapters.vlm_stages import Stages
from fewer.methods import resolve
from fewer.types import BudgetError, FewerError

LAYERS = 8


@dataclass(frozen=True)
class Cuts:
    """Cuts after these layers, and does nothing else."""

    at: tuple[int, ...]
    steps: tuple[float, ...] | None = None
    needs = frozenset[Any]()

    def after(self, layers: int) -> tuple[int, ...]:
        return self.at

    def score(self, tokens: Any) -> Any:
        raise AssertionError("budgets ask for no scores")

    allocate = reduce = score

    def path(self, cuts: int) -> tuple[float, ...]:
        return self.steps or tuple((i + 1) / cuts for i in range(cuts))


def test_a_cut_before_the_first_layer_is_read_by_all() -> None:
    stages = Stages([resolve("random")], 0.25, LAYERS)  # type: ignore[list-item]
    assert stages.counts(256) == [64] and stages.read(256, [64]) == [64] * 8


def test_three_quarters_leave_in_equal_steps() -> None:
    stages = Stages([Cuts((1, 3, 5))], 32, LAYERS)
    assert stages.counts(256) == [128, 64, 32]
    assert stages.read(256, stages.counts(256)) == [256, 256, 128, 128, 64, 64, 32, 32]


def test_a_published_way_of_its_own() -> None:
    stages = Stages([Cuts((1, 3), (0.75, 1.0))], 16, LAYERS)
    assert stages.counts(256) == [32, 16], "256 (16 / 256) ** 0.75 is 32"


def test_several_stages_share_a_budget_or_have_their_own() -> None:
    cuts: Any = [resolve("random"), Cuts((2,))]
    assert Stages(cuts, 64, LAYERS).counts(256) == [128, 64]
    assert Stages(cuts, [0.75, 20], LAYERS).counts(256) == [192, 20]
    assert Stages(cuts, 32, LAYERS, caching=True).counts(256) == [128, 64], "the cache takes the last half"
    with pytest.raises(BudgetError, match="cannot leave more than it gets"):
        Stages(cuts, [20, 0.75], LAYERS).counts(256)


@given(st.integers(2, 600), st.integers(1, 600), st.lists(st.integers(-1, 6), min_size=1, max_size=4, unique=True))
def test_counts_fall_and_end_exactly(had: int, keep: int, at: list[int]) -> None:
    stages = Stages([Cuts(tuple(sorted(at)))], 1.0 if keep == 1 else keep, LAYERS)
    counts = stages.counts(had)
    assert counts == sorted(counts, reverse=True) and counts[-1] == (had if keep == 1 else min(keep, had))


@given(st.integers(8, 600), st.floats(0.05, 0.95), st.lists(st.integers(-1, 6), min_size=1, max_size=4, unique=True))
def test_the_mean_is_the_largest_that_fits(had: int, keep: float, at: list[int]) -> None:
    stages = Stages([Cuts(tuple(sorted(at)))], keep, LAYERS, counted="mean")
    asked = stages.budget.count(had)
    try:
        counts = stages.counts(had)
    except BudgetError:
        assert sum(stages.read(had, stages._ways(had, 1))) / LAYERS > asked
        return
    assert sum(stages.read(had, counts)) / LAYERS <= asked
    if counts[-1] < had:
        assert sum(stages.read(had, stages._ways(had, counts[-1] + 1))) / LAYERS > asked


def test_places_that_are_not_there() -> None:
    for at in ((7,), (-2,), ()):
        with pytest.raises(FewerError, match="name some from 0 to 6"):
            Stages([Cuts(at)], 0.5, LAYERS)
