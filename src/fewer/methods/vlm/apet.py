"""ApET (Ma et al., CVPR 2026): keep the tokens that a few others explain worst.

    basis   ten tokens, farthest from each other: a random one, then always the one farthest from those chosen
    e_j     = |x_j - its best approximation as a sum of the basis|        least squares with a ridge of 1e-5
    kept      the tokens with the greatest e_j; each other token joins the kept one of greatest cosine, into their mean

It cuts before the first layer, and once more half-way down. Of the way to what is left in the end, the first cut goes
0.62, as from 576 by 96 to 32 tokens in the authors' example, on a logarithmic scale.

Differs from the paper: the random start of the basis has a seed. In the authors' code, which `official=True` follows,
the ten kept tokens of least error make way for the basis itself, at their places, and take nothing in: first in the
order of the picture, and half-way down in the order of errors. It works before the projector, and rounds to half
precision; this is after it, the errors in float64.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.farthest import farthest
from fewer.types import Allocation, Budget, Card, Plan, Reduction, Tokens, Transform

RIDGE = 1e-5


@dataclass(frozen=True)
class ApET:
    """The greatest errors of approximation.

    Args:
        basis: how many tokens the others are approximated by.
        at: the shares of the depth at which it cuts; 0 is before the first layer.
        seed: of the basis's first token.
        official: the least of the kept tokens are overwritten by the basis, as the authors' code does.
    """

    basis: int = 10
    at: tuple[float, ...] = (0.0, 0.5)
    seed: int = 0
    official: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2602.19870",
        faithfulness="official",
        mechanism="merge",
        differs="the basis takes no places unless official=True; after the projector",
        slugs=("apet",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset()

    def __post_init__(self) -> None:
        if self.basis < 1:
            raise FewerError(f"ApET(basis={self.basis!r}): at least one token, 10 in the paper")
        if not self.at or not all(0 <= share < 1 for share in self.at):
            raise FewerError(f"ApET(at={self.at!r}): shares of the depth are in [0, 1), such as (0, 0.5)")

    def after(self, layers: int) -> tuple[int, ...]:
        return tuple(sorted({min(int(layers * share) - 1, layers - 2) for share in self.at}))

    def path(self, cuts: int) -> tuple[float, ...]:
        return (math.log(6) / math.log(18), 1.0) if cuts == 2 else tuple((i + 1) / cuts for i in range(cuts))

    def score(self, tokens: Tokens) -> Tensor:
        """The errors e."""
        x = tokens.features[0].float()
        chosen, x = self._chosen(x), x.double()  # beside large norms the ridge is lost in float32
        base = x[chosen]
        gram = base @ base.T + RIDGE * torch.eye(len(base), dtype=x.dtype, device=x.device)
        shares = torch.linalg.solve(gram, base @ x.T).T  # (n, basis)
        errors: Tensor = (x - shares @ base).norm(dim=-1).float()
        return errors.unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Reduction:
        keep, n = int(allocation.counts), scores.shape[-1]
        x, order = tokens.features[0].float(), scores[0].argsort(descending=True, stable=True)
        chosen = self._chosen(x)
        own = min(keep, len(chosen)) if self.official and keep < n else 0  # places that the basis takes
        survivors = order[:keep].sort().values
        slot = torch.full((n,), -1, dtype=torch.long, device=x.device)
        slot[survivors] = torch.arange(keep, device=x.device)
        if own == keep:
            return self._lent(Plan.of(survivors.unsqueeze(0), n), tokens, chosen[:keep], order[:keep])
        left, unit = order[keep:], F.normalize(x, dim=-1)
        takers = order[: keep - own]
        slot[left] = slot[takers[(unit[left] @ unit[takers].T).argmax(-1)]]
        weight = 1 / torch.bincount(slot, minlength=keep).float()[slot]
        plan = Plan(slot.unsqueeze(0), weight.unsqueeze(0), survivors.unsqueeze(0))
        return self._lent(plan, tokens, chosen, order[keep - own : keep]) if own else plan

    def _lent(self, plan: Plan, tokens: Tokens, basis: Tensor, places: Tensor) -> Transform:
        """The plan with the basis's features at these tokens' places."""
        dense = Transform.of(plan)
        if tokens.site.place == 0:
            places = places.sort().values
        rows = plan.slot[0, places]
        dense.matrix[0, rows] = F.one_hot(basis, plan.slot.shape[-1]).to(dense.matrix.dtype)
        return dense

    def _chosen(self, x: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        first = torch.randint(len(x), (), generator=draw).to(x.device)
        return farthest(lambda j: (x - x[j]).square().sum(-1), first, min(self.basis, len(x)))
