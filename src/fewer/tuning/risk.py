"""A promise about the mean loss that needs no assumption on the data, only that examples are drawn as requests will be.

Learn then Test (Angelopoulos, Bates, Candès, Jordan, Lei 2021, arXiv 2110.01052): for each setting, test the null "its
true mean loss is above alpha" on calibration examples, with the p-value of Hoeffding and Bentkus (Bates et al. 2021,
arXiv 2101.02703). Settings are tested in an order that was fixed without these examples, and testing stops at the first
that does not pass: then the chance that any setting passed wrongly is at most delta, whatever their number.

Losses are in [0, 1] throughout. alpha is the mean loss that may be, delta = 1 - confidence.
"""

import math
from collections.abc import Sequence

from fewer.types import FewerError


def p_value(losses: Sequence[float | int], alpha: float) -> float:
    """The p-value of "the true mean loss is above alpha": below delta, the setting passes at confidence 1 - delta.

        min( exp(-n h(min(r, alpha), alpha)),  e P(Bin(n, alpha) <= ceil(n r)),  1 )     r the mean of the n losses
        h(a, b) = a log(a / b) + (1 - a) log((1 - a) / (1 - b))

    Raises:
        FewerError: there are no losses, one is outside [0, 1], or alpha is outside (0, 1).

    >>> round(p_value([0.0] * 149, alpha=0.02), 4)  # 0.98 to the power of 149
    0.0493
    """
    return _p(_total(losses, "p_value"), len(losses), _open("p_value", "alpha", alpha))


def needed(alpha: float, delta: float) -> int:
    """How many examples it takes at least: with fewer, not even a setting without any loss passes.

    >>> needed(0.02, 0.05), needed(0.1, 0.05)
    (149, 29)
    """
    _open("needed", "alpha", alpha)
    _open("needed", "delta", delta)
    n = max(1, math.ceil(math.log(delta) / math.log1p(-alpha)) - 1)  # (1 - alpha)^n <= delta, but for rounding
    while _p(0.0, n, alpha) > delta:
        n += 1
    return n


def fixed_sequence(p_values: Sequence[float | int], delta: float) -> int:
    """How many settings pass, from the start of a sequence up to the first that does not.

    The order must not come from the losses that gave the p-values: the safest first, by other examples or by how much
    is kept. Among those that pass any may be chosen, since all hold together with confidence 1 - delta.

    >>> fixed_sequence([0.001, 0.03, 0.2, 0.01], delta=0.05)
    2
    """
    _open("fixed_sequence", "delta", delta)
    for index, p in enumerate(p_values):
        if not 0 <= p <= 1:  # nan fails this too
            raise FewerError(f"fixed_sequence: p-value {index} is {p!r}; it is a number in [0, 1]")
    return next((index for index, p in enumerate(p_values) if p > delta), len(p_values))


def hopeless(total: float | int, n: int, alpha: float, delta: float) -> bool:
    """Whether a setting cannot pass on n examples any more: it has lost `total` on some, and would have to lose nothing
    on all others. Stopping it there changes no decision, so the bound stays as it is.

    >>> hopeless(1.0, 149, alpha=0.02, delta=0.05), hopeless(1.0, 300, alpha=0.02, delta=0.05)
    (True, False)
    """
    if n < 1 or not 0 <= total <= n:
        raise FewerError(f"hopeless: {total!r} is no sum of losses in [0, 1] over {n!r} examples")
    return _p(total, n, _open("hopeless", "alpha", alpha)) > _open("hopeless", "delta", delta)


def bound(losses: Sequence[float | int], delta: float) -> float:
    """The smallest alpha with `p_value(losses, alpha) <= delta`: with confidence 1 - delta the true mean loss is no
    higher. 1.0 where nothing below passes.

    >>> round(bound([0.0] * 149, delta=0.05), 4)
    0.0199
    """
    total, n = _total(losses, "bound"), len(losses)
    _open("bound", "delta", delta)
    low, high = total / n, 1.0
    while high - low > 1e-12:  # p falls as alpha rises: it is above delta at low, and not above it at high
        middle = (low + high) / 2
        low, high = (low, middle) if _p(total, n, middle) <= delta else (middle, high)
    return high


def below(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) < k).

    >>> round(below(1, 8, 0.02), 4)  # none of eight
    0.8508
    """
    return 0.0 if k < 1 else math.exp(_log_binomial_cdf(k - 1, n, p))


def _p(total: float | int, n: int, alpha: float) -> float:
    rate = min(total / n, alpha)
    hoeffding = math.exp(-n * _divergence(rate, alpha))
    bentkus = math.exp(min(0.0, 1 + _log_binomial_cdf(math.ceil(total), n, alpha)))
    return min(hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Relative entropy of a coin that shows a to one that shows b, in nats."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * (math.log1p(-a) - math.log1p(-b)) if a < 1 else 0.0)


def _log_binomial_cdf(k: int, n: int, p: float) -> float:
    """log P(Bin(n, p) <= k), summed term by term."""
    if k >= n:
        return 0.0
    whole, odds = math.lgamma(n + 1) + n * math.log1p(-p), math.log(p) - math.log1p(-p)
    terms = [whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * odds for i in range(k + 1)]
    most = max(terms)
    return min(0.0, most + math.log(math.fsum(math.exp(term - most) for term in terms)))


def _total(losses: Sequence[float | int], call: str) -> float:
    if not len(losses):
        raise FewerError(f"{call}: there are no losses; it takes one for each example")
    for index, loss in enumerate(losses):
        if not 0 <= loss <= 1:  # nan fails this too
            raise FewerError(f"{call}: loss {index} is {loss!r}; losses are in [0, 1]")
    return math.fsum(losses)  # exact, so that ten losses of 0.1 count as one and not as a little more


def _open(call: str, name: str, value: float) -> float:
    if not 0 < value < 1:
        raise FewerError(f"{call}: {name}={value!r} is not in (0, 1)")
    return value
