"""SinkLoRA's inference (arXiv 2406.05678): attention sinks, heavy hitters and the recent tokens.

    F_t(j) = F_{t-1}(j) + sum_q A_t(q, j)         attention received, as in H2O
    keep the first tokens, the last ones, and the top of F among the others

Differs from the paper: this is its cache alone; its training, shifted sparse attention with global sinks, is not here.
The paper says that it runs H2O on models whose sinks are global, its repository holds neither part, and how many sinks
a cache keeps is not said in what could be read: 4 is StreamingLLM's number, half of the rest for recent tokens H2O's.
Queries of decoding are not summed unless when="both".
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.position import must_stay, sinks_stay
from fewer.signals import Received
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class SinkLoRA:
    """Sinks, heavy hitters and recent tokens.

    Args:
        sinks: first tokens that always stay.
        recent: share of what the sinks leave that goes to the most recent tokens.
    """

    sinks: int = 4
    recent: float = 0.5

    card: ClassVar[Card] = Card(
        source="arXiv 2406.05678",
        faithfulness="style",
        differs="the cache at inference only; the number of sinks and the share of recent tokens are borrowed",
        slugs=("sinklora",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({Received()})

    def __post_init__(self) -> None:
        checks.counts(0, sinks=self.sinks)
        checks.shares(recent=self.recent)

    def score(self, tokens: Tokens) -> Tensor:
        return sinks_stay(tokens.signal(Received, Tensor), tokens, self.sinks)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        recent = ((allocation.counts - self.sinks).clamp(min=0) * self.recent).long()
        newest = tokens.positions >= (tokens.seen.view(-1, 1) - recent).unsqueeze(-1)
        return top_k(must_stay(scores, newest & ~tokens.padding), allocation)
