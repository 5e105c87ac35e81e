"""VisionZip (Yang et al., 2024): keep what the vision tower's class token looks at, fold the rest into a few more.

    s_j        = sum over heads of A[class, j]              in the layer whose features the language model gets
    dominant     the tokens with the greatest s_j
    contextual   of the others, every (rest // c)-th is a target; each other joins the target whose key, the mean over
                 heads, has the greatest cosine with its own; target + mean of those that joined it

Differs from the paper: the class token is not handed to the language model and counts nowhere (their code counts it
among the dominant ones, and prunes before the projector; folding and a projector's first linear map commute, its
activation does not). Where two folded tokens are one (`official=False`, the default), a target and those that joined it
are averaged: their sum has about twice the length of a token. Tokens stay in the order of the picture.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.signals.visual import By, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class VisionZip:
    """Dominant tokens by the tower's attention, contextual ones by folding.

    Args:
        contextual: the share of what stays that is made by folding; 10 of 64, 20 of 128 and 30 of 192 in the paper.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
        official: fold by target + mean, as the authors do, and not by a mean.
    """

    contextual: float = 10 / 64
    by: By = "class"
    official: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2412.04467",
        faithfulness="paper",
        mechanism="merge",
        differs="after the projector; folded by a mean unless official=True",
        slugs=("visionzip",),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.contextual < 1:
            raise FewerError(f"VisionZip(contextual={self.contextual!r}): a share of what stays, from 0 to below 1")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Tower(self.by)})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).attention.sum(0, keepdim=True)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        keep, n = int(allocation.counts), scores.shape[-1]
        folded = min(int(self.contextual * keep), keep - 1)
        order = scores[0].argsort(descending=True, stable=True)
        dominant, rest = order[: keep - folded].sort().values, order[keep - folded :].sort().values
        if not folded:
            return Plan.of(dominant.unsqueeze(0), n)
        step = len(rest) // folded
        target = torch.arange(0, step * folded, step, device=rest.device)
        others = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
        others[target] = False
        keys = F.normalize(tokens.signal(Tower, TowerView).keys.mean(0)[rest], dim=-1)
        joins = (keys[others] @ keys[target].T).argmax(-1)  # the target that each other token joins
        survivors = torch.cat([dominant, rest[target]]).sort().values
        slot = torch.full((n,), -1, dtype=torch.long, device=rest.device)
        slot[survivors] = torch.arange(keep, device=rest.device)
        slot[rest[others]] = slot[rest[target]][joins]
        members = torch.bincount(joins, minlength=folded).float()
        weight = (slot >= 0).float()
        weight[rest[others]] = 1 / (members if self.official else members + 1)[joins]
        if not self.official:
            weight[rest[target]] = 1 / (members + 1)
        return Plan(slot.unsqueeze(0), weight.unsqueeze(0), survivors.unsqueeze(0))
