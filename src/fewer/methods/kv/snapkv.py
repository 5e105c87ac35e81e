"""SnapKV (arXiv 2404.14469): keep what the end of the prompt attends to.

    a   = mean over the last w queries of softmax(q_w K^T)      (b, heads, n)
    s   = pool(a before the window, kernel)                      each score with its neighbours
    keep the window, and the top of s before it

Differs from the paper: scores are averaged over the query heads that share a key-value head, so that grouped-query
caches stay at their own size. A budget smaller than the window keeps the window's latest tokens. A chunk shorter than
the window observes with the queries it has; see `Queries`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.attention import per_head, smooth, window_attention
from fewer.score.position import latest, must_stay
from fewer.signals import Queries, QueryWindow
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class SnapKV:
    """Window attention, smoothed.

    Args:
        window: last queries that observe, and last tokens that stay.
        kernel: width of the pooling, odd.
        pooling: "mean" or "max".
    """

    window: int = 64
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    card: ClassVar[Card] = Card(
        source="arXiv 2404.14469",
        faithfulness="official",
        differs="averages scores over grouped query heads; budgets below the window keep its latest tokens",
    )

    def __post_init__(self) -> None:
        checks.counts(window=self.window)
        checks.odd(kernel=self.kernel)
        checks.words(("mean", "max"), pooling=self.pooling)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Queries(last=self.window)})

    def score(self, tokens: Tokens) -> Tensor:
        observers = tokens.signal(Queries, QueryWindow)
        seen = window_attention(observers, tokens.features, tokens.positions, tokens.padding)  # (b, heads, n)
        window = latest(tokens, self.window)  # (b, h, n)
        before = (~window).repeat_interleave(seen.shape[1] // window.shape[1], dim=1)
        rated = per_head(smooth(seen * before, self.kernel, self.pooling), window.shape[1])
        return must_stay(rated, window)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget, self.window)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
