"""Fourier-VLM (Wang et al., 2025): the low frequencies of the grid of visual tokens.

    F  = DCT(X)                    of rows and columns, type II, orthonormal
    F' = F[:h', :w']               the low-pass
    X' = sqrt(h'w' / hw) DCT^-1(F')  a grid of h' by w' tokens; a constant picture stays what it is

All three are linear, so they are one matrix: A(h', h) X A(w', w)^T.

Differs from the paper: the model is trained with it there, and in LLaVA it comes before the projector; here nothing is
trained, and it is after it. The authors' code leaves the root away, which makes tokens sqrt(hw / h'w') times as long: a
trained model learns that, another does not, so they keep their length unless `official=True`. There, h' and w' are the
same share of h and w. Here a crop's tokens become rows x columns as near to its shape as can be, and where no lattice
has as many cells as are to stay, some rows (or columns) are kept at one frequency more (`fewer.allocate.bands`). Crops
share the budget by their size; one whose tokens are no full rectangle is transformed along them in their order, in one
dimension; one that gets nothing leaves. Each new token has the position of the old one nearest to its middle.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer.allocate.bands import bands, cover, rectangles
from fewer.allocate.uniform import uniform
from fewer.reduce.groups import means
from fewer.signals.visual import Layout, Places
from fewer.types import Allocation, Budget, Card, Tokens, Transform


@dataclass(frozen=True)
class FourierVLM:
    """A low-pass of every crop's grid.

    Args:
        official: do not scale, as in the authors' code; tokens then get longer the fewer they are.
    """

    official: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2508.06038",
        faithfulness="official",
        mechanism="transform",
        differs="not trained, after the projector; tokens keep their length unless official=True; exact counts",
        slugs=("fourier-vlm",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Places()})

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros(tokens.positions.shape, device=tokens.positions.device)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Transform:
        layout, keep = tokens.signal(Places, Layout), int(allocation.counts)
        parts = rectangles(layout)
        sizes = [len(part.index) for part in parts]
        counts = Budget.split(keep, [float(size) for size in sizes], sizes)
        matrix, first = torch.zeros(keep, len(layout), device=layout.crop.device), 0
        for part, count in zip(parts, counts, strict=True):
            if not count:
                continue
            lattice = bands(part.height, part.width, count)
            v, u = lattice.turn(part.y, part.x)
            across, along = lattice.along
            down = lowpass(across, len(lattice.counts)).to(matrix)
            rows = [
                down[band, v] * lowpass(along, many).to(matrix)[:, u] for band, many in enumerate(lattice.counts)
            ]  # each (many, tokens of the crop)
            longer = (len(part.index) / count) ** 0.5 if self.official else 1.0
            matrix[first : first + count, part.index] = torch.cat(rows) * longer
            first += count
        cell, off = cover(parts, counts, len(layout))
        survivors = means(cell, off).survivors  # who gives each slot its place, and with that the order of slots
        return Transform(matrix[cell[survivors[0]]].unsqueeze(0), survivors)


@cache
def lowpass(n: int, m: int) -> Tensor:
    """`(m, n)`: the first m frequencies of n numbers, as m numbers."""
    if m == n:
        return torch.eye(n)
    return (_dct(m).T @ _dct(n)[:m] * math.sqrt(m / n)).float()


def _dct(n: int) -> Tensor:
    """The orthonormal transform of type II: one row for each frequency."""
    at = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(math.pi / n * (at + 0.5) * at.unsqueeze(1)) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows
