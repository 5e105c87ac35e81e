"""H2O (arXiv 2306.14048): heavy hitters, the tokens that received the most attention so far, and the recent ones.

    F_t(j) = F_{t-1}(j) + sum_q A_t(q, j)         accumulated over every query since the start
    keep the last r tokens, and the top of F among the others

Differs from the paper: scores are summed over the query heads that share a key-value head, so that grouped-query caches
stay at their own size; evicts when the policy compresses, not after every token (`when="both", every=1` does). Queries
of decoding are not summed unless when="both".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.position import must_stay
from fewer.signals import Received
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class H2O:
    """Heavy hitters and recent tokens.

    Args:
        recent: share of what is kept that goes to the most recent tokens (the published scripts use one half).
    """

    recent: float = 0.5

    card: ClassVar[Card] = Card(
        source="arXiv 2306.14048",
        faithfulness="official",
        differs="sums scores over grouped query heads; evicts when the policy compresses",
    )
    needs: ClassVar[frozenset[object]] = frozenset({Received()})

    def __post_init__(self) -> None:
        checks.shares(recent=self.recent)

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Received, Tensor)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        recent = (allocation.counts * self.recent).long()
        newest = tokens.positions >= (tokens.seen.view(-1, 1) - recent).unsqueeze(-1)
        return top_k(must_stay(scores, newest & ~tokens.padding), allocation)
