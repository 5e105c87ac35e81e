"""KeyDiff (arXiv 2504.15364): keep the keys that differ most from the average key.

    a   = mean_j k_j / ||k_j||
    s_j = -cos(k_j, a)

Differs from the paper: one decision over all the tokens there are; the paper's block-wise eviction is what chunked
prefill gives.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class KeyDiff:
    """Keep the most distinctive keys."""

    card: ClassVar[Card] = Card(
        source="arXiv 2504.15364", faithfulness="paper", differs="block-wise only under chunked prefill"
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        hidden = tokens.padding.unsqueeze(-1)
        keys = tokens.features.float().masked_fill(hidden, 0)
        anchor = F.normalize(keys, dim=-1).sum(-2, keepdim=True) / (~hidden).sum(-2, keepdim=True).clamp(min=1)
        return -F.cosine_similarity(keys, anchor, dim=-1)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
