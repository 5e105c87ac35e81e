"""KNorm (arXiv 2406.11430): keys of small norm draw the attention.

    s_j = -||k_j||_2

Differs from the paper: every layer is compressed; the paper leaves its first two layers whole for some models.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class KNorm:
    """Keep the keys of smallest norm."""

    card: ClassVar[Card] = Card(
        source="arXiv 2406.11430",
        faithfulness="paper",
        differs="compresses every layer; the paper may skip the first two",
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(tokens.features.float(), dim=-1)
        return -norm

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
