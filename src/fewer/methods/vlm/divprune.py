"""DivPrune (Alvar et al., CVPR 2025, "Diversity-based Visual Token Pruning"): keep tokens that are far from each other.

    d_ij    = 1 - cosine(x_i, x_j)
    first     the token whose nearest other token is the farthest
    then      again and again the token whose nearest chosen token is the farthest (greedy max-min diversity)

Knows neither attention nor the question, so it works behind any vision tower.

Differs from the paper: chosen tokens are not chosen again where all that is left is a copy of them (the authors' code
does so, and then keeps fewer than it was told to). Positions are kept, as they were with the authors' video models.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.farthest import farthest
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class DivPrune:
    """The most diverse tokens, by greedy max-min distance."""

    card: ClassVar[Card] = Card(
        source="arXiv 2503.02175",
        faithfulness="official",
        mechanism="prune",
        differs="no token is chosen twice",
    )
    needs: ClassVar[frozenset[Any]] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        """How far each token's nearest other one is."""
        apart = _apart(tokens)
        return apart.fill_diagonal_(torch.inf).amin(0, keepdim=True).clamp(max=2)  # a lone token has no other

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        apart = _apart(tokens)
        chosen = farthest(lambda j: apart[j], scores[0].argmax(), int(allocation.counts))
        return Plan.of(chosen.sort().values.unsqueeze(0), len(apart))


def _apart(tokens: Tokens) -> Tensor:
    unit = F.normalize(tokens.features[0].float(), dim=-1)
    return 1 - unit @ unit.T  # (n, n)
