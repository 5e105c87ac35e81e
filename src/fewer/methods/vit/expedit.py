"""Expedit (arXiv 2210.01035): cluster the patches once, run the later blocks on the clusters, and interpolate back.

    centres   the grid, averaged to a lattice of h' x w'
    rounds    five times: each patch divides itself by softmax(-T |x - centre|^2) among the 5 x 5 centres around its own
              cell, and each centre becomes the mean of what it got
    restore   compress(..., restore="kernel"): every patch is a mixture of the 20 final clusters that it was nearest to

Differs from the paper: restoring is the host's, at the end of the last block, before the encoder's final norm (the
authors' after it), and its weights add up to one (the authors' squares do). Class and register tokens are kept out of
the clusters, as in the authors' Segmenter; windowed encoders, as their SAM, are not served. T is the 0.01 of their SAM;
their configuration for ADE20K has 0.02. A budget that is no product of two fitting numbers is not met exactly: the
lattice below it is taken.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer.allocate.lattice import Lattice, cells, central, grid_of, grid_places, lattice
from fewer.reduce.fold import closed
from fewer.reduce.mix import mix
from fewer.types import Budget, BudgetError, Card, Plan, Tokens, Transform


@dataclass(frozen=True)
class Expedit:
    """Soft superpixels on a lattice. Attention does not count sizes, as the authors' does not.

    Args:
        after: the share of the blocks that run at full length; the paper's main result has 10 of 24.
        rounds: rounds of clustering.
        temperature: the factor on squared distances between features; greater is harder. It depends on the encoder:
            in DINOv2-S those distances are near 1 and 0.01 blurs each neighbourhood into one; 10 does well there.
        reach: patches join centres at most so many cells away, along both axes.
    """

    card: ClassVar[Card] = Card(
        source="arXiv 2210.01035",
        faithfulness="official",
        mechanism="transform",
        differs="restored before the final norm, with weights that add up to one",
        slugs=("expedit",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset()
    before: ClassVar[bool] = True
    masses: ClassVar[str] = "off"
    exact: ClassVar[bool] = False
    grids: ClassVar[bool] = True

    after: float = 10 / 24
    rounds: int = 5
    temperature: float = 0.01
    reach: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.after < 1:
            raise BudgetError(f"Expedit(after={self.after!r}): a share of the blocks is in [0, 1)")
        if self.rounds < 1 or self.reach < 0 or not self.temperature > 0:
            raise BudgetError(
                f"Expedit(rounds={self.rounds}, temperature={self.temperature}, reach={self.reach}): it takes at least "
                "one round, a temperature above 0 and a reach of 0 or more"
            )

    def places(self, layers: int) -> list[int]:
        return [min(layers - 1, round(layers * self.after))]

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros(tokens.positions.shape, device=tokens.positions.device)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Lattice:
        return lattice(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Lattice) -> Plan | Transform:
        index = torch.arange(tokens.positions.shape[-1], device=tokens.positions.device)
        plan = Plan.keep((central(tokens, allocation.shape) == index) & ~tokens.padding)
        if bool((plan.counts == tokens.available).all()):
            return plan
        x, shape = tokens.features.float(), allocation.shape.unsqueeze(1)
        home = cells(tokens, allocation.shape)
        mine = home.gather(1, plan.survivors.clamp(min=0).unsqueeze(-1).expand(-1, -1, 2))  # (b, k, 2)
        far = ((mine.unsqueeze(2) - home.unsqueeze(1)).abs() > self.reach).any(-1)  # (b, k, n)
        # the first centres: adaptive average pooling, whose windows overlap where the lattice does not divide the grid
        size, at = torch.tensor(grid_of(tokens), device=x.device), grid_places(tokens).unsqueeze(1)
        begin, end = mine * size // shape, -(-(mine + 1) * size // shape)
        inside = ((at >= begin.unsqueeze(2)) & (at < end.unsqueeze(2))).all(-1) & ~closed(tokens).unsqueeze(1)
        centres = inside.float() @ x / inside.sum(-1, keepdim=True).clamp(min=1)
        for _ in range(self.rounds):
            apart = torch.cdist(centres, x).square().masked_fill(far, torch.inf)
            found = mix(tokens, plan, -self.temperature * apart)
            centres = found.matrix @ x
        return found
