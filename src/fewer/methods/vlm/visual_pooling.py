"""Visual pooling: the mean of each cell of a coarser grid, crop by crop. The baseline of every merging method.

    budget    shared among crops (or frames) by their size
    lattice   rows x columns of cells over a crop's grid; where no lattice has as many cells as it is to keep, some of
              its bands, evenly spread, have one more (`fewer.allocate.bands`)
    merge     the tokens of each cell, into their mean; the most central one gives it its place

Differs from the paper: there is none; M3 (Cai et al., 2024) pools in this way with training. A crop whose tokens are no
full rectangle (something else has cut before, or the model has scaled them) is pooled along its tokens in their order,
in runs of nearly equal length. A crop that gets nothing, where fewer tokens are asked for than there are crops, leaves.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer.allocate.bands import cover, rectangles
from fewer.allocate.uniform import uniform
from fewer.reduce.groups import means
from fewer.signals.visual import Layout, Places
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class VisualPooling:
    """Two-dimensional average pooling, to exactly as many tokens as asked for."""

    card: ClassVar[Card] = Card(
        source="a baseline, as torch's adaptive average pooling",
        faithfulness="own",
        mechanism="merge",
        differs="cells do not overlap, and bands may differ by a cell",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Places()})

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros(tokens.positions.shape, device=tokens.positions.device)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        layout = tokens.signal(Places, Layout)
        parts = rectangles(layout)
        sizes = [len(part.index) for part in parts]
        counts = Budget.split(int(allocation.counts), [float(size) for size in sizes], sizes)
        return means(*cover(parts, counts, len(layout)))
