"""Full: keep everything. The row that every comparison needs.

Differs from the paper: there is none.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fewer.prompts.source import Ranking, Source
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class Full:
    """Everything, whatever the budget says."""

    card: ClassVar[Card] = Card(source="the host's own cache", faithfulness="own", mechanism="keep")
    needs: ClassVar[frozenset[object]] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        n = len(source.whole)
        return Ranking(source.whole, np.zeros(n), chosen=np.ones(n, dtype=bool))
