"""P-values against exact fractions, the bound against simulated draws, and broken procedures that the draws catch."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from fewer.tuning.risk import bound, fixed_sequence, hopeless, needed, p_value
from fewer.types import FewerError

ALPHA, DELTA, N, DRAWS = 0.1, 0.1, 150, 1000


def exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


def naive(losses: Sequence[float], alpha: float) -> float:
    """The formula as it is printed."""
    n, r = len(losses), sum(losses) / len(losses)
    a = min(r, alpha)
    h = (a * math.log(a / alpha) if a else 0) + (1 - a) * math.log((1 - a) / (1 - alpha))
    bentkus = math.e * float(exact_cdf(math.ceil(round(n * r, 9)), n, Fraction(alpha)))
    return min(1.0, math.exp(-n * h), bentkus)


def test_by_hand() -> None:
    # no loss in n: Hoeffding gives (1 - alpha)^n
    assert p_value([0.0] * 10, 0.5) == pytest.approx(0.5**10)
    # one loss in four, alpha 1/2: h = 1/4 log 1/2 + 3/4 log 3/2, exp(-4 h) = 2 (2/3)^3 = 16/27; Bentkus e 5/16 = 0.85
    assert p_value([0, 0, 1, 0], 0.5) == pytest.approx(16 / 27)
    # three of a hundred at 0.1: here Bentkus is the smaller one
    losses = [1.0] * 3 + [0.0] * 97
    assert p_value(losses, 0.1) == pytest.approx(math.e * float(exact_cdf(3, 100, Fraction(1, 10))))
    assert p_value([1.0, 1.0], 0.3) == 1.0


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("n", [1, 7, 60, 400])
def test_agrees_with_exact_fractions(alpha: float, n: int) -> None:
    rng = np.random.default_rng(n)
    for losses in ((rng.random(n) < alpha / 2).astype(float), rng.random(n) * alpha, rng.random(n).round(1)):
        assert p_value(losses.tolist(), alpha) == pytest.approx(naive(losses.tolist(), alpha), rel=1e-9)


def test_many_examples_stay_finite() -> None:
    assert p_value([0.0] * 100_000, 0.02) == 0.0
    assert 0 < p_value([0.0, 1.0] * 10_000, 0.51) < 0.05


def test_rounding_of_the_sum_is_no_further_loss() -> None:
    """Ten losses of 0.1 add up to a little less or more than one, as floats have it."""
    assert p_value([0.1] * 30 + [0.0] * 70, 0.1) == pytest.approx(p_value([1.0] * 3 + [0.0] * 97, 0.1))


def test_needed_is_the_fewest() -> None:
    for alpha in (0.01, 0.02, 0.05, 0.2, 0.5, 0.9):
        for delta in (0.2, 0.1, 0.05, 0.001):
            n = needed(alpha, delta)
            assert p_value([0.0] * n, alpha) <= delta
            assert n == 1 or p_value([0.0] * (n - 1), alpha) > delta


def test_fixed_sequence_stops_at_the_first_that_fails() -> None:
    assert fixed_sequence([], 0.1) == 0
    assert fixed_sequence([0.2, 0.0, 0.0], 0.1) == 0
    assert fixed_sequence([0.0, 0.1, 0.1000001, 0.0], 0.1) == 2
    assert fixed_sequence([0.0] * 4, 0.1) == 4


def test_hopeless_is_the_p_value_were_all_else_without_loss() -> None:
    for lost in range(8):
        for n in (30, 60, 100):
            rest = [1.0] * lost + [0.0] * (n - lost)
            assert hopeless(lost, n, ALPHA, 0.05) == (p_value(rest, ALPHA) > 0.05)
    # it never comes back: more loss, more hopeless
    assert sorted(hopeless(lost / 2, 100, ALPHA, 0.05) for lost in range(30)) == [
        hopeless(lost / 2, 100, ALPHA, 0.05) for lost in range(30)
    ]


def test_the_bound_is_where_the_p_value_meets_delta() -> None:
    rng = np.random.default_rng(0)
    for losses in (
        [0.0] * 20,
        rng.random(50).tolist(),
        [1.0] + [0.0] * 40,
        (rng.random(200) < 0.03).astype(float).tolist(),
    ):
        top = bound(losses, 0.05)
        assert np.mean(losses) < top < 1
        assert p_value(losses, top) <= 0.05 < p_value(losses, top - 1e-9)
    assert bound([1.0] * 5, 0.05) == 1.0


# --- what is promised, on data whose true risk is known ---

Choose = Callable[[NDArray[np.float64]], int]
"""From losses, `(settings, n)`, to the index of the setting that is used; -1 for none."""


def binary(rng: np.random.Generator, risks: Sequence[float]) -> NDArray[np.float64]:
    """An example is hard or easy for all settings alike, so settings go wrong together."""
    return (rng.random(N) < np.asarray(risks)[:, None]).astype(float)


def graded(rng: np.random.Generator, risks: Sequence[float]) -> NDArray[np.float64]:
    """Losses between 0 and 1: Beta with a = r / 2, b = (1 - r) / 2, most of them near the ends."""
    r = np.asarray(risks)[:, None]
    return rng.beta(r / 2, (1 - r) / 2, (len(risks), N))


def apart(rng: np.random.Generator, risks: Sequence[float]) -> NDArray[np.float64]:
    """Each setting fails on examples of its own."""
    return (rng.random((len(risks), N)) < np.asarray(risks)[:, None]).astype(float)


def learn_then_test(losses: NDArray[np.float64]) -> int:
    return fixed_sequence([p_value(row.tolist(), ALPHA) for row in losses], DELTA) - 1


def by_the_mean(losses: NDArray[np.float64]) -> int:
    """Broken: the last whose mean on the examples is low enough."""
    passing = np.flatnonzero(losses.mean(1) <= ALPHA)
    return int(passing[-1]) if len(passing) else -1


def any_that_passes(losses: NDArray[np.float64]) -> int:
    """Broken: does not stop at the first that fails, so each further setting is another chance to be lucky."""
    passing = [i for i, row in enumerate(losses) if p_value(row.tolist(), ALPHA) <= DELTA]
    return passing[-1] if passing else -1


def broken_promises(choose: Choose, draw: Callable[..., NDArray[np.float64]], risks: Sequence[float]) -> float:
    """The share of draws in which the chosen setting's true risk is above alpha."""
    rng = np.random.default_rng(0)
    chosen = [choose(draw(rng, risks)) for _ in range(DRAWS)]
    return float(np.mean([index >= 0 and risks[index] > ALPHA for index in chosen]))


ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
RISKS = (0.01, 0.03, 0.06, 0.101, 0.12, 0.3)
"""Safest first, with one just above alpha."""


@pytest.mark.parametrize("draw", [binary, apart, graded])
@pytest.mark.parametrize("risks", [RISKS, (0.1001, 0.1002, 0.1003), (0.05, 0.5)])
def test_the_promise_fails_no_more_often_than_allowed(
    draw: Callable[..., NDArray[np.float64]], risks: Sequence[float]
) -> None:
    assert broken_promises(learn_then_test, draw, risks) <= ALLOWED


def test_the_simulation_sees_a_choice_by_the_mean() -> None:
    assert broken_promises(by_the_mean, binary, RISKS) > ALLOWED
    assert broken_promises(by_the_mean, graded, RISKS) > ALLOWED


def test_the_simulation_sees_a_sequence_that_does_not_stop() -> None:
    assert broken_promises(any_that_passes, apart, [0.101] * 12) > ALLOWED


def test_safe_settings_do_pass() -> None:
    """A bound that never lets anything through would keep every promise."""
    rng = np.random.default_rng(1)
    chosen = [learn_then_test(binary(rng, (0.01, 0.03, 0.3))) for _ in range(200)]
    assert np.mean([index == 1 for index in chosen]) > 0.8


def test_the_bound_covers_the_true_mean() -> None:
    rng = np.random.default_rng(2)
    missed = np.mean([bound(graded(rng, [0.1])[0].tolist(), DELTA) < 0.1 for _ in range(300)])
    assert missed <= DELTA


# --- bad input ---


@pytest.mark.parametrize("losses", [[0.0, 1.1], [-0.1], [0.0, math.nan], [math.inf]])
def test_losses_outside_0_to_1(losses: list[float]) -> None:
    with pytest.raises(FewerError, match=rf"loss {len(losses) - 1} is .*\[0, 1\]"):
        p_value(losses, 0.1)
    with pytest.raises(FewerError, match=r"^bound: loss"):
        bound(losses, 0.1)


def test_no_losses() -> None:
    for call in (p_value, bound):
        with pytest.raises(FewerError, match="there are no losses"):
            call([], 0.1)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_levels_outside_0_to_1(bad: float) -> None:
    for call in (
        lambda: p_value([0.0], bad),
        lambda: needed(bad, 0.1),
        lambda: needed(0.1, bad),
        lambda: fixed_sequence([0.0], bad),
        lambda: hopeless(0.0, 1, bad, 0.1),
        lambda: hopeless(0.0, 1, 0.1, bad),
        lambda: bound([0.0], bad),
    ):
        with pytest.raises(FewerError, match=r"is not in \(0, 1\)"):
            call()


def test_what_is_no_p_value_and_no_sum() -> None:
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(FewerError, match="p-value 1 is"):
            fixed_sequence([0.0, p], 0.1)
    for total, n in ((-1.0, 5), (6.0, 5), (math.nan, 5), (0.0, 0)):
        with pytest.raises(FewerError, match="no sum of losses"):
            hopeless(total, n, 0.1, 0.1)
