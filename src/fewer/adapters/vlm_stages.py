"""Which method cuts visual tokens after which layer, and to how many: one budget for all of them.

    keep=64            64 of every picture's tokens are left after the last cut (or per="prompt": of all pictures)
    keep=0.25          a quarter of them
    keep=[0.5, 0.25]   what each of several stages leaves, of all there were
    counted="mean"     keep is the mean over the layers: what a method that cuts late reads early counts

Where there are several cuts, the same share leaves at each, unless a method was published with another way: its `path`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from fewer.adapters.vlm_encoder import BEFORE
from fewer.methods import family_of
from fewer.types import Budget, BudgetError, FewerError, Keep, Method

PER = ("picture", "prompt")
COUNTED = ("last", "mean")


@dataclass(frozen=True)
class Stage:
    """One method at one cut; `left` says how many of so many tokens it leaves."""

    method: Method
    left: Callable[[int], int]

    def count(self, had: int, now: int) -> int:
        """Tokens that go on, of `now` that are left of `had`."""
        return min(now, self.left(had))


class Stages:
    """All cuts of a model with so many layers."""

    def __init__(
        self,
        methods: Sequence[Method],
        keep: Keep | Sequence[Keep],
        layers: int,
        per: str = "picture",
        counted: str = "last",
        caching: bool = False,
    ) -> None:
        if per not in PER:
            raise FewerError(f"per={per!r}: a budget is for every 'picture' or for all of a 'prompt'")
        if counted not in COUNTED:
            raise BudgetError(
                f"counted={counted!r}: keep counts what is left after the 'last' cut, or the 'mean' layer"
            )
        if any(early(method) for method in methods[1:]):
            raise FewerError("a stage inside the vision tower, or on pixels, comes first, and there is one at most")
        self.methods, self.layers, self.per, self.counted = tuple(methods), layers, per, counted
        stages = len(methods) + caching  # the cache's method comes last, and takes its share of what leaves
        if isinstance(keep, (list, tuple)):
            if len(keep) != stages:
                raise BudgetError(f"keep={keep!r} names {len(keep)} budgets for {stages} stages")
            if counted == "mean":
                raise BudgetError("counted='mean' takes one keep for all stages, not a list")
            self.budgets: list[Budget] | None = [Budget.parse(one) for one in keep]
            self.budget = self.budgets[-1]
        else:
            self.budgets, self.budget = None, Budget.parse(keep)  # type: ignore[arg-type]
        if any(one.size is not None for one in self.budgets or [self.budget]):
            raise BudgetError(f"keep={keep!r}: visual tokens are kept by share or by number, not by bytes")
        self.whole = all(one.whole for one in self.budgets or [self.budget])
        self.cuts: list[tuple[int, Method, int, float]] = []
        for index, method in enumerate(methods):
            at = [BEFORE] if early(method) else sorted(set(places(method, layers)))
            steps = path(method, len(at))
            self.cuts += [(after, method, index, e) for after, e in zip(at, steps, strict=True)]
        order = [after for after, *_ in self.cuts]
        if order != sorted(order):
            raise FewerError(
                f"the stages cut after layers {order}, and a stage cannot act before the one named before it: name "
                "them in the order in which they act"
            )
        self.stages = stages
        self.at: dict[int, list[Stage]] = {-1: []} if methods and early(methods[0]) else {}
        for number, (after, method, _, _) in enumerate(self.cuts):
            if after > BEFORE:
                self.at.setdefault(after, []).append(Stage(method, lambda had, number=number: self.counts(had)[number]))  # type: ignore[misc]
        self.counts: Callable[[int], list[int]] = lru_cache(self._counts)

    def _ways(self, had: int, final: int) -> list[int]:
        """Tokens left after every cut, where so many are to be left at the end."""
        if self.budgets is None:
            ends = [had * (final / had) ** ((i + 1) / self.stages) for i in range(self.stages)]
            ends[-1] = final
        else:
            ends = [float(one.count(had)) for one in self.budgets]
        starts = [float(had), *ends]
        if any(b > a for a, b in pairwise(starts)):
            raise BudgetError(
                f"keep={[one.keep for one in self.budgets or ()]}: a stage cannot leave more than it gets (1 and "
                "1.0 both mean everything)"
            )
        return [
            max(1, math.ceil(starts[i] * (ends[i] / starts[i]) ** e - 1e-9)) if e < 1 else math.ceil(ends[i] - 1e-9)
            for _, _, i, e in self.cuts
        ]

    def _mean(self, had: int, counts: Sequence[int]) -> float:
        return sum(self.read(had, counts)) / self.layers

    def read(self, had: int, counts: Sequence[int]) -> list[int]:
        """Visual tokens that every layer reads."""
        left, out = had, []
        for layer in range(self.layers):
            for (after, *_), count in zip(self.cuts, counts, strict=True):
                left = min(left, count) if after == layer - 1 or (after < 0 and layer == 0) else left
            out.append(left)
        return out

    def _counts(self, had: int) -> list[int]:
        asked = self.budget.count(had)
        if self.counted == "last":
            return self._ways(had, asked)
        low, high = 1, had  # the most that can be left so that the layers read no more than was asked on average
        if self._mean(had, least := self._ways(had, 1)) > asked:
            raise BudgetError(
                f"keep={self.budget.keep!r} on average: before its last cut this reads {self._mean(had, least):.1f} of "
                f"{had} tokens a layer even if one is left; ask for more, or for a method that cuts earlier"
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._mean(had, self._ways(had, middle)) <= asked else (low, middle - 1)
        return self._ways(had, low)


def early(method: Any) -> bool:
    """Whether a method acts before the language model has any tokens: in the vision tower, or on pixels."""
    return family_of(type(method)) == "vit" or bool(getattr(method, "pixels", False))


def places(method: Any, layers: int) -> Sequence[int]:
    """The layers after which a method cuts, -1 for before the first; there if it does not say."""
    asked: Callable[[int], Sequence[int]] | None = getattr(method, "after", None)
    if asked is None:
        return (-1,)
    found = asked(layers)
    bad = [after for after in found if not -1 <= after < layers - 1]
    if bad or not found:
        raise FewerError(
            f"{type(method).__name__} cuts after layers {tuple(found)}, and this language model has {layers}: name "
            f"some from 0 to {layers - 2}"
        )
    return found


def path(method: Any, cuts: int) -> Sequence[float]:
    """How far each cut of a method goes on the way from all to what is left, as exponents up to 1."""
    asked: Callable[[int], Sequence[float]] | None = getattr(method, "path", None)
    return [(i + 1) / cuts for i in range(cuts)] if asked is None else asked(cuts)
