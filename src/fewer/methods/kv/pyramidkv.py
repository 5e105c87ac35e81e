"""PyramidKV (arXiv 2406.02069): SnapKV's scores, more budget for early layers than for late ones.

    c = count - w;  last layer gets c / beta, first 2c - c / beta (at most all there is), linear between, each plus w

Differs from the paper: shares are rounded by largest remainder, so that the layers' total is exactly the budget (the
official integer division misses it either way, by a few tokens a layer); scores are averaged over grouped query heads,
as in our SnapKV.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewer import checks
from fewer.allocate.by_layer import falling
from fewer.allocate.uniform import uniform
from fewer.methods.kv.snapkv import SnapKV
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class PyramidKV:
    """Window attention with a budget that falls from layer to layer.

    Args:
        window, kernel, pooling: as in SnapKV.
        beta: steepness; the last layer keeps 1 / beta of the even share (and the window).
    """

    window: int = 64
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"
    beta: int = 20

    card: ClassVar[Card] = Card(
        source="arXiv 2406.02069",
        faithfulness="official",
        differs="exact totals by largest remainder; averages scores over grouped query heads",
    )

    def __post_init__(self) -> None:
        checks.counts(window=self.window, beta=self.beta)
        checks.odd(kernel=self.kernel)
        checks.words(("mean", "max"), pooling=self.pooling)

    @property
    def needs(self) -> frozenset[object]:
        return self._scorer.needs

    @property
    def _scorer(self) -> SnapKV:
        return SnapKV(self.window, self.kernel, self.pooling)

    def score(self, tokens: Tokens) -> Tensor:
        return self._scorer.score(tokens)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return falling(tokens, budget, self.window, self.beta, even=uniform(tokens, budget, self.window))

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
