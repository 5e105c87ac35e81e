"""The words every part of fewer speaks: what is shortened, how much may stay, and the decision itself, as data.

    Tokens  ->  Allocation  ->  Plan  ->  Report
    what there is   how many stay   who stays, who joins whom   what it saved

Axes are always `b h n d`: batch rows, heads, tokens, features; tokens are next to last in features. `*lead` stands for
the leading axes of a place, `b h` in a key-value cache.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.errors import BudgetError, FewerError, FewerWarning, MissingSignal, UnknownName, UnsupportedModel
from fewer.plan import Plan, Reduction, Transform

__all__ = [
    "Allocation",
    "Budget",
    "BudgetError",
    "Card",
    "Faithfulness",
    "FewerError",
    "FewerWarning",
    "Keep",
    "Matching",
    "Method",
    "MissingSignal",
    "Need",
    "Phase",
    "Plan",
    "Reduction",
    "Site",
    "Tokens",
    "Transform",
    "UnknownName",
    "UnsupportedModel",
]

Keep = float | int | str
Phase = Literal["prefill", "decode", "encode"]
Faithfulness = Literal["official", "paper", "style", "own"]


@dataclass(frozen=True)
class Budget:
    """How much may stay, always what is KEPT.

    A fraction in (0, 1] of the tokens seen so far, a count of tokens a head (an integer from 2 on; 1 and 1.0 both mean
    everything), or bytes for all layers that are compressed, with their metadata and the signals that wait in them for
    the next decoding step ("64MB", "1.5GiB").

    The only rounding rules of the library live here: a fraction keeps `ceil(keep * seen)` tokens, bytes are a ceiling,
    and totals that must be split are split by largest remainder (`split`), so that they add up exactly.

    >>> Budget.parse(0.25).count(1000), Budget.parse(64).count(1000), Budget.parse(64).count(10)
    (250, 64, 10)
    >>> Budget.parse("64MB").size
    64000000
    """

    keep: Keep
    fraction: float | None = None
    tokens: int | None = None
    size: int | None = None
    beside: int = 0
    """Tokens that are protected and stay on top: an encoder's class and register tokens."""

    _UNITS: ClassVar[Mapping[str, int]] = {
        "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
    }  # fmt: skip

    @classmethod
    def parse(cls, keep: Keep) -> "Budget":
        """Read what a user wrote; `BudgetError` names the value and what would work."""
        hint = "keep is what stays: a fraction in (0, 1], a token count such as 256, or bytes such as '64MB'"
        if isinstance(keep, str):
            if sized := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|B)\s*", keep.upper()):
                size = int(float(sized[1]) * cls._UNITS[sized[2]])
                if size < 1:
                    raise BudgetError(f"keep={keep!r} is no bytes at all; {hint}")
                return cls(keep, size=size)
            try:
                number = int(keep) if re.fullmatch(r"\s*[+-]?\d+\s*", keep) else float(keep)
            except ValueError:
                raise BudgetError(f"keep={keep!r} cannot be read; {hint}") from None
            return cls.parse(number)
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise BudgetError(f"keep={keep!r} cannot be read; {hint}")
        if keep == 1:
            return cls(keep, fraction=1.0)
        if isinstance(keep, float):
            if not 0 < keep < 1:  # nan fails this too
                raise BudgetError(f"keep={keep!r} is not a fraction in (0, 1]; {hint}")
            return cls(keep, fraction=keep)
        if keep < 1:
            raise BudgetError(f"keep={keep!r} would leave nothing; {hint}")
        return cls(keep, tokens=keep)

    @property
    def whole(self) -> bool:
        """True if everything stays."""
        return self.fraction == 1.0

    def within(self, cost: Callable[[int], int]) -> "Budget":
        """The same budget with bytes turned into tokens a head: the most whose `cost(tokens)`, for every layer, row and
        head together and with all metadata, is no more than was asked for."""
        if self.size is None:
            return self
        if self.size < cost(1):
            raise BudgetError(
                f"keep={self.keep!r} is below the {cost(1):,} bytes that a single token takes in this cache "
                f"(all layers, heads and batch rows, and what is held beside tokens); ask for at least that"
            )
        low, high = 1, 2
        while cost(high) <= self.size:
            low, high = high, 2 * high
        while high - low > 1:  # cost(low) fits, cost(high) does not
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= self.size else (low, middle)
        return Budget(self.keep, tokens=low)

    def count(self, seen: int) -> int:
        """Tokens that stay, of `seen` so far."""
        free = seen - self.beside
        if self.fraction is not None:
            return min(seen, self.beside + max(1, math.ceil(self.fraction * free - 1e-9)))
        if self.tokens is not None:
            return min(self.tokens + self.beside, seen)
        raise BudgetError(f"keep={self.keep!r} is in bytes and needs the size of a token: call within() first")

    @staticmethod
    def split(total: int, weights: list[float], caps: list[int]) -> list[int]:
        """Split `total` in proportion to `weights`, no part above its cap, by largest remainder: exact or an error.

        >>> Budget.split(10, [1.0, 1.0, 1.0], [9, 9, 9])
        [4, 3, 3]
        >>> Budget.split(10, [8.0, 1.0, 1.0], [4, 9, 9])
        [4, 3, 3]
        """
        if total > sum(caps):
            raise BudgetError(f"{total} tokens cannot be placed where only {sum(caps)} fit")
        parts, free, left = [0] * len(caps), list(range(len(caps))), total
        while True:
            mass = sum(weights[i] for i in free)
            # where every open part weighs nothing, they share alike
            ideal = {i: left * (weights[i] / mass if mass > 0 else 1 / len(free)) for i in free}
            full = [i for i in free if ideal[i] >= caps[i]]
            if not full:
                break
            for i in full:  # a part at its cap takes no share of the rest
                parts[i] = caps[i]
                left -= caps[i]
            free = [i for i in free if i not in full]
        for i in free:
            parts[i] = int(ideal[i])
        short = total - sum(parts)
        for i in sorted(free, key=lambda i: (parts[i] - ideal[i], i))[:short]:
            parts[i] += 1
        return parts


@dataclass(frozen=True)
class Site:
    """Where in the network, and when: layer `layer` of the `layers` that are shortened.

    In an encoder the first `prefix` tokens are class, distillation or register tokens and the others a `grid` of rows
    and columns of patches, where they are patches; `place` counts the blocks at which the method acts, of `places`.
    """

    layer: int = 0
    layers: int = 1
    phase: Phase = "prefill"
    prefix: int = 0
    grid: tuple[int, int] | None = None
    place: int = 0
    places: int = 1


S = TypeVar("S")


@dataclass(frozen=True)
class Tokens:
    """Everything known about the tokens at one place.

    `features` are the keys in a cache. `positions` count a row's real tokens from 0, so padding never shifts them.
    `padding` marks cells that hold no token; they come before the real ones. `protected` tokens survive whatever their
    score. `mass` is how many tokens each one counts as in attention, None where each is one. `seen` is how many real
    tokens each row has had so far, more than there are here if some were dropped before. `signals` holds what the
    method's `needs` asked for, by the need's class.
    """

    features: Float[Tensor, "*lead n d"]
    positions: Int[Tensor, "*lead n"]
    padding: Bool[Tensor, "*lead n"]
    protected: Bool[Tensor, "*lead n"]
    seen: Int[Tensor, " b"]
    values: Float[Tensor, "*lead n e"] | None = None
    signals: Mapping[type, Any] = field(default_factory=dict)
    site: Site = Site()
    mass: Float[Tensor, "*lead n"] | None = None

    def signal(self, need: type, kind: type[S]) -> S:
        """What the host gathered for `need`, as a `kind`."""
        found = self.signals.get(need)
        if not isinstance(found, kind):
            raise MissingSignal(f"the method reads {need.__name__}, which is not in its needs or was not gathered here")
        return found

    @property
    def available(self) -> Int[Tensor, "*lead"]:
        """Real tokens at each leading index."""
        return (~self.padding).sum(-1)


class Matching(NamedTuple):
    """Scores that come with a partner: the token that takes each one in, if it is given up."""

    value: Float[Tensor, "*lead n"]
    partner: Int[Tensor, "*lead n"]


@dataclass(frozen=True)
class Allocation:
    """How many survive at each leading index; `floor` of them are guaranteed to that index's own best tokens.

    `note` says why the counts are not what the budget asked for, where they are not.
    """

    counts: Int[Tensor, "*lead"]
    floor: Int[Tensor, "*lead"] | None = None
    note: str = ""


@dataclass(frozen=True)
class Card:
    """What a reader wants to know of a method before using it; printed by `fewer methods` and `fewer show`.

    `faithfulness`: "official" is equal to the authors' code on tensors, "paper" is written from the paper's text,
    "style" from incomplete sources, "own" has no paper. `slugs` name the entries of the project's list of systems that
    the method makes work.
    """

    source: str
    faithfulness: Faithfulness
    mechanism: str = "evict"
    training: str = "none"
    differs: str = "nothing known"
    slugs: tuple[str, ...] = ()


@runtime_checkable
class Need(Protocol):
    """A signal that a method asks its host to gather; see `fewer.signals`. `key_bytes` is what it costs a kept key."""

    key_bytes: int

    def start(self) -> Any: ...


@runtime_checkable
class Method(Protocol):
    """What a method is: four members, nothing to inherit. Every method's file writes all of them."""

    @property
    def needs(self) -> frozenset[Any]:
        """The signals it reads, as instances of classes in `fewer.signals`."""
        ...

    def score(self, tokens: Tokens) -> Any:
        """One number for each token, a tensor `*lead n`, higher = keep; or a `Matching`, which names partners too. A
        method never writes into tokens."""
        ...

    def allocate(self, tokens: Tokens, scores: Any, budget: Budget) -> Allocation:
        """How many survive at each leading index. `scores` are what `score` gave, +inf for protected tokens."""
        ...

    def reduce(self, tokens: Tokens, scores: Any, allocation: Allocation) -> Any:
        """Who survives, and who joins whom: a `Plan`, or a `Transform`."""
        ...
