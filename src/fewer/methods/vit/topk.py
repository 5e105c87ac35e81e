"""Top-K (the baseline of arXiv 2308.04657, and EViT's score): keep what the class token attends to.

    score    the class token's attention to each token, averaged over heads
    keep     the same share at three places, a quarter, half and three quarters of the way

Differs from the paper: an encoder without a class token is rated by the attention each token gets from all, which is
what others do; the keep rate of each place follows from the share that is to be left, and counts are rounded up, the
authors' down.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.heads import attention_got, quarters
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class TopK:
    """Pruning by the class token's attention."""

    card: ClassVar[Card] = Card(
        source="arXiv 2308.04657",
        faithfulness="official",
        mechanism="prune",
        differs="rated by received attention where there is no class token; `keep` sets the places' counts, rounded up",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    schedule: ClassVar[str] = "geometric"

    def places(self, layers: int) -> list[int]:
        return quarters(layers)

    def score(self, tokens: Tokens) -> Tensor:
        return attention_got(tokens.signal(Heads, Attended), tokens.site.prefix)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
