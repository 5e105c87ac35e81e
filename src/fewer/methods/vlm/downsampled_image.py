"""A smaller picture: the baseline that published comparisons forget, and that often wins them.

    h' x w'   cells of a lattice over the patches of the picture, as many as the budget pays for
    pixels    scaled to h' x w' patches, with antialiasing, before the vision tower reads them

Differs from the paper: there is none. The tower is given positions interpolated to the smaller grid, as its own code
does it. A budget that is no product of two fitting numbers is not met exactly: the lattice below it is taken. Each
token takes the place of the patch in the middle of its cell.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.lattice import Lattice, central, lattice
from fewer.types import Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class DownsampledImage:
    """The picture, scaled down before anything reads it."""

    card: ClassVar[Card] = Card(source="a baseline", faithfulness="own", mechanism="pixels")
    needs: ClassVar[frozenset[object]] = frozenset()
    pixels: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    grids: ClassVar[bool] = True

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros(tokens.positions.shape, device=tokens.positions.device)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Lattice:
        return lattice(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Lattice) -> Plan:
        middle = central(tokens, allocation.shape)
        index = torch.arange(middle.shape[-1], device=middle.device)
        return Plan.keep((middle == index) & ~tokens.padding)
