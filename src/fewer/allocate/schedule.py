"""How many tokens of an encoder go on after each block: one number or a list, made into a budget for every place.

    constant    the same number leaves at every place                  (ToMe's r)
    linear      the number that leaves falls linearly to zero          (ToMe's (r, -1))
    geometric   the same share stays at every place                    (EViT's and DynamicViT's keep rate)

The tokens that are protected, an encoder's class and register tokens, come on top of every number here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fewer.types import Budget, BudgetError

SHAPES = ("constant", "linear", "geometric")
MOST_HALVED = 1.9
"""Where half of the tokens join the other half, at least one in 1.9 stays: protected tokens may sit among either."""
HINT = (
    "keep is the share of patches that is left at the end, in (0, 1]; a list of shares or counts, one a block; or a "
    "share of the FLOPs such as '0.6 flops'"
)


@dataclass(frozen=True)
class Schedule:
    """What a user asked for: `keep`, a share, a list of shares or counts, or FLOPs; and the shape of the way there.

    >>> Schedule(0.25, "constant").shares(3)
    (0.75, 0.5, 0.25)
    >>> Schedule(0.125, "geometric").shares(3)
    (0.5, 0.25, 0.125)
    """

    keep: Any
    shape: str = "constant"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise BudgetError(f"schedule={self.shape!r}: known schedules are {', '.join(SHAPES)}")
        self.flops  # noqa: B018  # reads `keep`, and refuses what cannot be read

    @property
    def whole(self) -> bool:
        """Whether everything stays, whatever the input."""
        return self.keep == 1 if isinstance(self.keep, (int, float)) else False

    @property
    def flops(self) -> float | None:
        """The share of FLOPs that was asked for, None if tokens were."""
        if isinstance(self.keep, str):
            found = re.fullmatch(r"\s*(0?\.\d+|1(?:\.0*)?|\d+(?:\.\d+)?%)\s*flops\s*", self.keep.lower())
            if not found:
                raise BudgetError(f"keep={self.keep!r} cannot be read; {HINT}")
            share = float(found[1].rstrip("%")) / (100 if found[1].endswith("%") else 1)
            return _share(share, self.keep)
        if isinstance(self.keep, Sequence):
            for one in self.keep:
                if isinstance(one, bool) or not isinstance(one, (int, float)) or (isinstance(one, int) and one < 1):
                    raise BudgetError(f"keep={list(self.keep)!r}: {one!r} is neither a share nor a count; {HINT}")
                if isinstance(one, float):
                    _share(one, self.keep)
            if any(type(one) is int and one == 1 for one in self.keep) and any(one > 1 for one in self.keep):
                raise BudgetError(
                    f"keep={list(self.keep)!r}: 1 means everything, as 1.0 does, and beside counts it may be taken for "
                    "one token: write 1.0 for everything, and counts from 2 on"
                )
        elif isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)):
            raise BudgetError(f"keep={self.keep!r} cannot be read; {HINT}")
        else:
            _share(float(self.keep), self.keep)
        return None

    def shares(self, places: int, keep: float | None = None) -> tuple[float, ...]:
        """The share that is left after each of `places` places."""
        end = self.keep if keep is None else keep
        assert isinstance(end, (int, float))
        steps = range(1, places + 1)
        if self.shape == "geometric":
            return tuple(end ** (j / places) for j in steps)
        if self.shape == "linear" and places > 1:
            leaving = [places - j for j in steps]  # the last place lets nobody go
            return tuple(1 - (1 - end) * sum(leaving[:j]) / sum(leaving) for j in steps)
        return tuple(1 - (1 - end) * j / places for j in steps)

    def budgets(
        self,
        places: Sequence[int],
        layers: int,
        protected: int,
        *,
        halves: bool = False,
        cost: Callable[[Sequence[float]], float] = lambda shares: 1.0,
    ) -> dict[int, Budget]:
        """The budget at each place, by layer.

        Args:
            places: the layers at which the method acts, in order.
            layers: all layers of the encoder; a list in `keep` has one entry for each of them, or for each place.
            protected: tokens that stay on top of the budget.
            halves: whether at most half of the tokens can leave at one place, by joining the other half.
            cost: the share of FLOPs that shares at `places` cost; needed where FLOPs were asked for.
        """
        if isinstance(self.keep, Sequence) and not isinstance(self.keep, str):
            return self._listed(places, layers, protected)
        shares = self.shares(len(places)) if self.flops is None else self._solved(len(places), cost, halves)
        if halves:
            shares = halved(shares, self.keep)
        return {at: Budget(share, fraction=share, beside=protected) for at, share in zip(places, shares, strict=True)}

    def _listed(self, places: Sequence[int], layers: int, protected: int) -> dict[int, Budget]:
        assert not isinstance(self.keep, (int, float, str))
        asked: list[float | int] = list(self.keep)
        at = range(layers) if len(asked) == layers else places
        if len(asked) != len(at):
            raise BudgetError(
                f"keep={asked!r} has {len(asked)} entries; it takes one for each of the {layers} blocks"
                + (f", or for each of the {len(places)} at which this method acts" if len(places) != layers else "")
            )
        if any(type(a) is type(b) and b > a for a, b in pairwise(asked)):
            raise BudgetError(f"keep={asked!r} rises: what has left does not come back")
        return {
            layer: Budget(one, tokens=one, beside=protected)
            if isinstance(one, int) and one != 1
            else Budget(one, fraction=float(one), beside=protected)
            for layer, one in zip(at, asked, strict=True)
        }

    def _solved(self, places: int, cost: Callable[[Sequence[float]], float], halves: bool) -> tuple[float, ...]:
        """The largest shares of this shape that cost no more than was asked."""

        def at(end: float) -> tuple[float, ...]:
            out, left = [], 1.0
            for share in self.shares(places, end):
                left = max(share, left / MOST_HALVED) if halves else share
                out.append(left)
            return tuple(out)

        asked = self.flops
        assert asked is not None
        low, high = 1e-3, 1.0
        if cost(at(low)) > asked:
            raise BudgetError(
                f"keep={self.keep!r} cannot be met: with next to no tokens left, this method still takes "
                f"{cost(at(low)):.2f} of the FLOPs on this input; ask for more than that"
            )
        if cost(at(high)) <= asked:
            return at(high)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(at(middle)) <= asked else (low, middle)
        return at(low)


def halved(shares: Sequence[float], asked: object) -> tuple[float, ...]:
    """The same end, with no step that lets more than about half go: earlier places take over what later ones cannot."""
    out = list(shares)
    for j in range(len(out) - 1, 0, -1):
        out[j - 1] = min(out[j - 1], MOST_HALVED * out[j])
    if out[0] < 1 / MOST_HALVED:
        raise BudgetError(
            f"keep={asked!r} cannot be met: tokens join in pairs, so {len(out)} places leave at least "
            f"{MOST_HALVED ** -len(out):.2g} of them; ask for more, or take a method that prunes"
        )
    return tuple(out)


def _share(share: float, asked: object) -> float:
    if not 0 < share <= 1:  # nan fails this too
        raise BudgetError(f"keep={asked!r}: {share!r} is not in (0, 1]; {HINT}")
    return share
