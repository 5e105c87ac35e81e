"""TOVA (arXiv 2401.06104): keep what the last token attends to.

    s_j = mean over all heads of softmax(q_last K^T)_j, one score for all heads of a layer

Differs from the paper: evicts when the policy compresses, not after every token (`when="both", every=1` does). The last
token is not protected, where kvpress does that: it stays by the attention that it pays to itself.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.attention import window_attention
from fewer.signals import Queries, QueryWindow
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class TOVA:
    """Token omission via attention: the last query decides, for all heads of a layer alike."""

    card: ClassVar[Card] = Card(
        source="arXiv 2401.06104",
        faithfulness="official",
        differs="evicts when the policy compresses; after every token with when='both', every=1",
    )
    needs: ClassVar[frozenset[object]] = frozenset({Queries(last=1)})

    def score(self, tokens: Tokens) -> Tensor:
        window = tokens.signal(Queries, QueryWindow)
        seen = window_attention(window, tokens.features, tokens.positions, tokens.padding)  # (b, heads, n)
        return seen.mean(1, keepdim=True).expand_as(tokens.positions)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
