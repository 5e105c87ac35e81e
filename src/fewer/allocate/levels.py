"""A budget of its own for every layer, or every head: what a search over levels finds (`fewer.allocate.evolve`).

compress(model, "snapkv", keep=[0.5, 0.25, ...])              one for each layer that is shortened
compress(model, "snapkv", keep=[[0.5, 0.25], [0.1, 0.4], ...])   one for each of a layer's key-value heads
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from fewer.types import Allocation, Budget, BudgetError, Keep, Method, Tokens

Level = float | int | tuple[float | int, ...]


@dataclass(frozen=True)
class Levels:
    """Another method's scores and reduction, with given budgets in the place of its allocation.

    `levels` holds a fraction or a count for each layer, or a tuple of them with one for each head.
    """

    method: Method
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, method: Method, keep: Sequence[Any]) -> "tuple[Levels, Budget]":
        """The method with these budgets, and their mean, which is what the whole keeps.

        Raises:
            BudgetError: the list is empty, mixes fractions and counts, or holds what is no budget.
        """
        levels = tuple(tuple(one) if isinstance(one, (list, tuple)) else one for one in keep)
        rows = [_row(one) for one in levels]
        flat = [budget for row in rows for budget in row]
        if not all(rows) or not flat or any(budget.size is not None for budget in flat):
            raise BudgetError(f"keep={keep!r}: give each layer a fraction or a count, or a list with one for each head")
        made = cls(method, levels)
        if all(budget.whole for budget in flat):
            return made, Budget.parse(1.0)
        if len({budget.fraction is None for budget in flat}) > 1:
            raise BudgetError(f"keep={keep!r} mixes fractions and counts; give one kind")
        return made, _mean([_mean(row) for row in rows])

    def __getattr__(self, name: str) -> Any:
        """What else a host asks a method: when it acts, what it stores in, what it skips."""
        if name.startswith("__") or name == "method":  # while it is being copied there is no method yet
            raise AttributeError(name)
        return getattr(self.method, name)

    @property
    def needs(self) -> frozenset[Any]:
        return self.method.needs

    def score(self, tokens: Tokens) -> Any:
        return self.method.score(tokens)

    def allocate(self, tokens: Tokens, scores: Any, budget: Budget) -> Allocation:
        self.check(tokens.site.layers)
        available = tokens.available  # (b, h)
        row = _row(self.levels[tokens.site.layer])
        if len(row) not in (1, available.shape[1]):
            raise BudgetError(
                f"keep: layer {tokens.site.layer} was given {len(row)} budgets, and it has {available.shape[1]} "
                f"key-value heads"
            )
        heads = row * available.shape[1] if len(row) == 1 else row
        counts = torch.tensor([[one.count(seen) for one in heads] for seen in tokens.seen.tolist()])
        return Allocation(torch.minimum(counts.to(available.device), available))

    def reduce(self, tokens: Tokens, scores: Any, allocation: Allocation) -> Any:
        return self.method.reduce(tokens, scores, allocation)

    def budget(self, layer: int) -> Budget:
        """The mean over the heads of one layer."""
        return _mean(_row(self.levels[layer]))

    def check(self, layers: int) -> None:
        """Raise `BudgetError` unless there is a budget for each of so many layers."""
        if len(self.levels) != layers:
            raise BudgetError(
                f"keep has {len(self.levels)} budgets, and {layers} layers are shortened; give one for each"
            )


def levelled(method: Method, keep: Keep | Sequence[Any]) -> tuple[Method, Budget]:
    """A method and its budget, as a user gave them.

    >>> levelled(fewer.METHODS["knorm"](), [0.5, 0.25])
    (Levels(method=KNorm(), levels=(0.5, 0.25)), Budget(keep=0.375, fraction=0.375, tokens=None, size=None, beside=0))
    """
    return Levels.of(method, keep) if isinstance(keep, (list, tuple)) else (method, Budget.parse(keep))  # type: ignore[arg-type]


def _row(level: Any) -> list[Budget]:
    return [Budget.parse(one) for one in (level if isinstance(level, tuple) else (level,))]


def _mean(budgets: Sequence[Budget]) -> Budget:
    if budgets[0].fraction is not None:
        mean = fmean(budget.fraction or 0.0 for budget in budgets)
        return Budget(round(mean, 6), fraction=mean)
    count = round(fmean(budget.tokens or 0 for budget in budgets))
    return Budget(count, tokens=count)
