"""DPC-KNN (TCFormer, arXiv 2204.08680, section 3.2): clusters around density peaks among nearest neighbours.

    density   exp(-mean squared distance to the k nearest tokens, itself among them)
    delta     the distance to the nearest token of greater density; for the densest, the greatest distance there is
    centres   the tokens of greatest density x delta; everyone joins the nearest centre, and clusters are averaged

Distances are Euclidean, between the block's inputs, over the square root of the width.

Differs from the paper: TCFormer learns a score p for each token, averages with weights exp(p) and adds p to attention;
nothing is learned here and p is the logarithm of the token's size, which does both. It clusters once between stages of
a pyramid, after a convolution; here as in the comparison of arXiv 2308.04657: before three blocks of a plain encoder,
without the class token, the same share at each. Of tokens equally dense the earlier one counts as the denser, where the
authors' code adds noise of 1e-6; and all is done in logarithms, where densities below that noise are in order too.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.fold import closed, gather_in, masses
from fewer.reduce.select import top_k
from fewer.score.density import distances, peaks
from fewer.score.heads import quarters
from fewer.types import Allocation, Budget, BudgetError, Card, Plan, Tokens


@dataclass(frozen=True)
class DPCKNN:
    """Density-peak clustering.

    Args:
        k: neighbours that make up a token's density, itself among them.
    """

    card: ClassVar[Card] = Card(
        source="arXiv 2204.08680",
        faithfulness="official",
        mechanism="merge",
        differs="sizes in place of learned scores; no noise on densities",
    )
    needs: ClassVar[frozenset[Any]] = frozenset()
    before: ClassVar[bool] = True
    schedule: ClassVar[str] = "geometric"

    k: int = 5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise BudgetError(f"DPCKNN(k={self.k}): a density takes at least one neighbour")

    def places(self, layers: int) -> list[int]:
        return quarters(layers)

    def score(self, tokens: Tokens) -> Tensor:
        return peaks(distances(tokens.features), closed(tokens), self.k)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        plan = top_k(scores, allocation)
        centre = (plan.slot >= 0) & ~closed(tokens)
        apart = distances(tokens.features).masked_fill(~centre.unsqueeze(1), torch.inf)
        return gather_in(tokens, plan, apart.argmin(-1), masses(tokens))
