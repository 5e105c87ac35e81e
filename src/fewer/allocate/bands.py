"""Exactly so many cells over a grid: a lattice, or one whose bands differ by a cell or so.

The lattice of at most so many cells that is nearest (`fewer.allocate.lattice.nearest`) is laid over the grid. Where it
has fewer, some of its bands, evenly spread, are cut into one more cell; bands are rows, or columns where rows are full.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from fewer.allocate.lattice import nearest
from fewer.signals.visual import Layout


@dataclass(frozen=True)
class Bands:
    """`counts[i]` cells in band i of a grid of `height` by `width`: bands of rows, or of columns if `turned`."""

    height: int
    width: int
    counts: tuple[int, ...]
    turned: bool = False

    @property
    def along(self) -> tuple[int, int]:
        """The grid's extent across the bands, and along them."""
        return (self.width, self.height) if self.turned else (self.height, self.width)

    def turn(self, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Places across the bands, and along them."""
        return (x, y) if self.turned else (y, x)


def bands(height: int, width: int, count: int) -> Bands:
    """`count` cells, from 1 to all, over a grid.

    >>> bands(4, 4, 4).counts, bands(4, 4, 5).counts
    ((2, 2), (2, 3))
    >>> bands(4, 4, 13)
    Bands(height=4, width=4, counts=(3, 3, 3, 4), turned=True)
    """
    rows, columns = nearest(height, width, count)
    turned = rows * width < count
    number = columns if turned else rows
    ends = [(i + 1) * count // number for i in range(number)]
    counts = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    return Bands(height, width, counts, turned)


def cells_of(lattice: Bands, y: Int[Tensor, " n"], x: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Tensor]:
    """The cell of each place of the grid, band by band, and how far it is from the cell's middle, squared."""
    across, along = lattice.along
    v, u = lattice.turn(y, x)
    counts = torch.tensor(lattice.counts, device=y.device)
    band = v * len(counts) // across
    many = counts[band]
    cell = u * many // along
    off = ((v + 0.5) * len(counts) / across - band - 0.5) * across / len(counts)
    aside = ((u + 0.5) * many / along - cell - 0.5) * along / many
    return (counts.cumsum(0) - counts)[band] + cell, (off.square() + aside.square()).float()


@dataclass(frozen=True)
class Rectangle:
    """A crop's tokens `index` as a full rectangle of rows and columns; of one row, in their order, if they are none."""

    index: Int[Tensor, " m"]
    y: Int[Tensor, " m"]
    x: Int[Tensor, " m"]
    height: int
    width: int


def rectangles(layout: Layout) -> list[Rectangle]:
    """Every crop that has tokens. Rows and columns that are empty, as where a model cuts off borders, count nowhere."""
    found = []
    for crop in torch.unique(layout.crop).tolist():
        index = (layout.crop == crop).nonzero().flatten()
        rows, y = torch.unique(layout.y[index], return_inverse=True)
        columns, x = torch.unique(layout.x[index], return_inverse=True)
        height, width = len(rows), len(columns)
        if height * width != len(index) or len(torch.unique(y * width + x)) != len(index):
            height, width = 1, len(index)
            y, x = torch.zeros_like(y), torch.arange(width, device=index.device)
        found.append(Rectangle(index, y, x, height, width))
    return found


def cover(parts: list[Rectangle], counts: list[int], n: int) -> tuple[Int[Tensor, " n"], Tensor]:
    """So many cells over each rectangle: the cell of each of `n` tokens, counted through all rectangles, -1 for tokens
    in none; and how far each token is from its cell's middle, squared."""
    device = parts[0].index.device
    cell, off, first = torch.full((n,), -1, device=device), torch.zeros(n, device=device), 0
    for part, count in zip(parts, counts, strict=True):
        if count:
            own, off[part.index] = cells_of(bands(part.height, part.width, count), part.y, part.x)
            cell[part.index] = first + own
            first += count
    return cell, off
