"""AdaKV (arXiv 2407.11550): one budget for all heads of a layer, more to heads whose attention is spread out.

    n_i = how many of the layer's top h * c scores head i holds
    head i keeps  floor * c + (1 - floor) * n_i  of its own best, h * c in all

Any scorer can stand inside; the heads really keep different numbers, and their memory is really freed.

Differs from the paper: the total is exact (the official rounding is not corrected); the scorer inside pools each query
head before the mean over its group, as our SnapKV does, where the official code pools after it. The official script can
weigh heads by how much of their mass their top tokens hold (normalize=True, kernel 5); this is its normalize=False.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from fewer import checks
from fewer.allocate.across_heads import across_heads
from fewer.inner import must_evict
from fewer.methods.kv.snapkv import SnapKV
from fewer.types import Allocation, Budget, Card, Method, Plan, Tokens


@dataclass(frozen=True)
class AdaKV:
    """Adaptive budgets over heads, around any scorer.

    Args:
        scorer: any method that only evicts or merges, and shares its budget among heads evenly; its needs, its scores,
            who stays at a head, and when it acts are its own.
        floor: share of the even budget that every head is sure of.
    """

    scorer: Method = field(default_factory=lambda: SnapKV(window=32, kernel=7, pooling="max"))
    floor: float = 0.2

    card: ClassVar[Card] = Card(
        source="arXiv 2407.11550",
        faithfulness="official",
        differs="exact totals; pools before the mean over grouped query heads; the official normalize=False",
    )

    def __post_init__(self) -> None:
        checks.shares(floor=self.floor)
        must_evict(self, self.scorer)

    @property
    def needs(self) -> frozenset[Any]:
        return self.scorer.needs

    def score(self, tokens: Tokens) -> Tensor:
        rated: Tensor = self.scorer.score(tokens)
        return rated

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return across_heads(tokens, scores, self.scorer.allocate(tokens, scores, budget), self.floor)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        plan: Plan = self.scorer.reduce(tokens, scores, allocation)
        return plan
