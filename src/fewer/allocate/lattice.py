"""As many as a lattice over the grid of patches has cells: the budget's count, or as little below it as can be."""

from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.types import Allocation, Budget, Tokens, UnsupportedModel

LONGEST = 2.0
"""Cells are at most this many times as long as they are wide, in patches: stripes would pool along one axis only."""


@dataclass(frozen=True)
class Lattice(Allocation):
    """An allocation of one survivor for each cell of a lattice that has tokens in it, and one for each protected token.

    `shape` is the lattice's rows and columns, of every row of the batch.
    """

    shape: Int[Tensor, "b 2"] = field(kw_only=True)


def lattice(tokens: Tokens, budget: Budget) -> Lattice:
    """The lattice with the most cells that the budget, less the protected tokens, pays for.

    Where everything may stay the lattice is the grid itself. Counts are of cells that have tokens in them: the tokens
    may be what an earlier lattice has left of the grid.
    """
    height, width = grid_of(tokens)
    asked, there = uniform(tokens, budget).counts, tokens.available
    own = (tokens.protected & ~tokens.padding).sum(-1)
    most = torch.where(asked >= there, height * width, asked - own).tolist()
    shape = torch.tensor([nearest(height, width, max(1, count)) for count in most], device=tokens.positions.device)
    index = torch.arange(tokens.positions.shape[-1], device=shape.device)
    kept = (central(tokens, shape) == index) & ~tokens.padding
    return Lattice(kept.sum(-1), shape=shape)


@cache
def nearest(height: int, width: int, count: int) -> tuple[int, int]:
    """The rows and columns, at most `count` cells in all, of a lattice over a grid of `height` by `width`.

    Most cells first, then the squarest ones. A grid that is itself a stripe has only stripes to offer.

    >>> nearest(14, 14, 98), nearest(14, 14, 49), nearest(7, 7, 11)
    ((7, 14), (7, 7), (3, 3))
    """
    found = []
    for rows in range(1, min(height, count) + 1):
        columns = max(1, min(width, count // rows, int(LONGEST * width * rows / height)))
        long = max(height * columns / (width * rows), width * rows / (height * columns))
        found.append((long > LONGEST, -rows * columns if long <= LONGEST else long, long, rows, columns))
    return min(found)[-2:]


def grid_of(tokens: Tokens) -> tuple[int, int]:
    """The grid of patches, or an error that says what is missing."""
    if tokens.site.grid is None:
        raise UnsupportedModel(
            "this method pools a grid of patches, and this encoder shows none (a text encoder, or patches that are not "
            "cut by a convolution): take a method that merges by likeness, such as 'tome'"
        )
    return tokens.site.grid


def grid_places(tokens: Tokens) -> Int[Tensor, "b n 2"]:
    """The row and column of each token in the original grid; protected prefix tokens are put at its first patch."""
    _, width = grid_of(tokens)
    at = (tokens.positions - tokens.site.prefix).clamp(min=0)
    return torch.stack([at // width, at % width], -1)


def cells(tokens: Tokens, shape: Int[Tensor, "b 2"]) -> Int[Tensor, "b n 2"]:
    """The row and column of the lattice that each token is in."""
    size = torch.tensor(grid_of(tokens), device=shape.device)
    return grid_places(tokens) * shape.unsqueeze(1) // size


def central(tokens: Tokens, shape: Int[Tensor, "b 2"]) -> Int[Tensor, "b n"]:
    """The token nearest to the middle of each token's cell, the first of several; closed tokens are their own."""
    size = torch.tensor(grid_of(tokens), device=shape.device)
    index = torch.arange(tokens.positions.shape[-1], device=shape.device).expand_as(tokens.positions)
    cell = cells(tokens, shape)
    # twice the distance to the middle in units of 1 / shape: all whole numbers, so that ties are ties
    off = (2 * grid_places(tokens) + 1) * shape.unsqueeze(1) - (2 * cell + 1) * size
    far = (off.double() / shape.unsqueeze(1)).square().sum(-1)  # in patches, for cells need not be square
    shut = tokens.protected | tokens.padding
    flat = cell[..., 0] * size[1] + cell[..., 1]
    blank = far.new_full((len(far), int(size.prod())), torch.inf)
    best = blank.scatter_reduce(1, flat, far.masked_fill(shut, torch.inf), "amin").gather(1, flat)
    rank = torch.where((far == best) & ~shut, index, index.shape[-1])
    none = torch.full(blank.shape, index.shape[-1], device=index.device)
    first = none.scatter_reduce(1, flat, rank, "amin").gather(1, flat)
    return torch.where(shut, index, first)
