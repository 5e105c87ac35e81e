"""Pooling: the mean of each cell of a coarser grid, whatever is in the image. The baseline of every merging method.

    lattice   h' x w' cells over the grid of patches, as many as the budget pays for
    merge     the tokens of each cell, into their size-weighted mean; the most central one gives it its place

Differs from the paper: there is none. It is adaptive average pooling with cells that do not overlap, which is the same
where h' divides h and w' divides w. A budget that is no product of two fitting numbers is not met exactly: the lattice
below it is taken. Where it acts more than once, later lattices pool what earlier ones left, by its place in the
original grid, and cells that have nothing in them are no tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer.allocate.lattice import Lattice, central, lattice
from fewer.reduce.fold import gather_in, masses
from fewer.types import Budget, BudgetError, Card, Plan, Tokens


@dataclass(frozen=True)
class Pooling:
    """Average pooling over the grid of patches.

    Args:
        at: the shares of the depth at which it acts, each in [0, 1); the first quarter runs at full length by default.
    """

    card: ClassVar[Card] = Card(
        source="a baseline, as torch's adaptive average pooling",
        faithfulness="own",
        mechanism="merge",
        differs="cells do not overlap",
    )
    needs: ClassVar[frozenset[Any]] = frozenset()
    before: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    grids: ClassVar[bool] = True

    at: tuple[float, ...] = (0.25,)

    def __post_init__(self) -> None:
        if not self.at or not all(0 <= share < 1 for share in self.at):
            raise BudgetError(f"Pooling(at={self.at!r}): shares of the depth are in [0, 1), such as (0.25, 0.5)")

    def places(self, layers: int) -> list[int]:
        return [min(layers - 1, round(layers * share)) for share in self.at]

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros(tokens.positions.shape, device=tokens.positions.device)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Lattice:
        return lattice(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Lattice) -> Plan:
        middle = central(tokens, allocation.shape)
        index = torch.arange(middle.shape[-1], device=middle.device)
        kept = Plan.keep((middle == index) & ~tokens.padding)
        return gather_in(tokens, kept, middle, masses(tokens))
