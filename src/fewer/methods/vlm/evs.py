"""EVS, Efficient Video Sampling (Bagrov et al., 2025): drop what has not changed since the frame before.

    s_i = 1 - cosine(x_i, the token at the same place one frame before);  of the first frame, more than any other

The tokens with the greatest s_i of the whole video stay, whichever frame they are of.

Differs from the paper: the paper compares pixels; this compares projected features, as the same authors do in vLLM,
where the count is never less than a frame's. Here it is what was asked for: where that is less than the first frame,
evenly spaced tokens of it stay and nothing else. A place whose token of the frame before is gone already counts as new.
A picture is an error.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.within import evenly
from fewer.score.frames import elsewhen, number
from fewer.signals.visual import Layout, Places
from fewer.types import Allocation, Budget, Card, Plan, Tokens

NEW = 255.0


@dataclass(frozen=True)
class EVS:
    """What changed most since the frame before."""

    card: ClassVar[Card] = Card(
        source="arXiv 2510.14624",
        faithfulness="official",
        mechanism="prune",
        differs="as in vLLM, on features; budgets below one frame are met",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Places()})
    videos: ClassVar[bool] = True

    def score(self, tokens: Tokens) -> Tensor:
        layout, x = tokens.signal(Places, Layout), tokens.features[0].float()
        first = number(layout, "EVS") == 0
        before = torch.where(first, -1, elsewhen(layout, (layout.crop - 1).clamp(min=0)))
        same = F.cosine_similarity(x, x[before], dim=-1)
        return torch.where(before < 0, NEW, 1 - same).unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        keep, order = int(allocation.counts), scores[0].argsort(descending=True, stable=True)
        new = int((scores[0] == NEW).sum())
        if keep < new:
            order = evenly(order[:new], keep)
        return Plan.of(order[:keep].sort().values.unsqueeze(0), scores.shape[-1])
