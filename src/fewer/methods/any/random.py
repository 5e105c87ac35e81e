"""Random: keep tokens drawn at random. Whatever loses to this is not worth its code.

    s_j ~ U(0, 1), drawn for each layer, head and position, or word of a text, from one seed

Differs from the paper: there is none. A row's draw depends on the position in the row alone, so batches and padding do
not change it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.prompts.source import Ranking, Source
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class Random:
    """Uniformly random eviction.

    Args:
        seed: the only source of randomness.
    """

    seed: int = 0

    card: ClassVar[Card] = Card(source="baseline", faithfulness="own")
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.counts(None, seed=self.seed)

    def score(self, tokens: Tokens) -> Tensor:
        b, *heads, _ = tokens.positions.shape  # an encoder's tokens are of all heads
        h = heads[0] if heads else 1
        longest = int(tokens.positions.max()) + 1
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + tokens.site.layer)
        drawn = torch.rand(longest, h, generator=draw).T.to(tokens.positions.device)  # (h, longest)
        places = tokens.positions.clamp(min=0).view(b, h, -1)
        return drawn.expand(b, h, longest).gather(-1, places).view(tokens.positions.shape)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        return Ranking(source.words, np.random.default_rng(self.seed % 2**64).random(len(source.words)))
