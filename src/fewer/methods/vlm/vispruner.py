"""VisPruner (Zhang et al., 2024, "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning"):
half of what stays is what the tower's class token looks at, the other half is what is least like the rest.

    s_j        = mean over heads of A[class, j]             in the layer whose features the language model gets
    important    the tokens with the greatest s_j
    diverse      of the others, in the order of s: every second one is compared to all between them, and the 8 of the
                 greatest cosine leave; this again, the compared ones ordered by it, until few enough are left

With `important=1` no token is chosen for being different: that is FasterVLM, by the same authors (its first version).

Each crop of a picture, and each frame of a video, is done alone; all leave the same share.

Differs from the paper: their code measures likeness before the projector, here it is that of the projected features.
It leaves as many tokens of each crop, padding and all, and drops the padding afterwards. Where an odd number is left or
fewer than 16, it stops with an error; here at most all of the compared ones leave. Equal scores keep their order.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.signals.visual import By, Layout, Places, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens

ROUND = 8
"""Tokens that leave at once."""


@dataclass(frozen=True)
class VisPruner:
    """Important tokens by the tower's attention, diverse ones by leaving out what is said twice.

    Args:
        important: the share of what stays that is chosen by attention; the paper names 0.5, more for few tokens.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
    """

    important: float = 0.5
    by: By = "class"

    card: ClassVar[Card] = Card(
        source="arXiv 2412.01818",
        faithfulness="official",
        mechanism="prune",
        differs="likeness of the projected features; crops by their tokens without padding",
        slugs=(),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise FewerError(f"VisPruner(important={self.important!r}): a share of what stays, from 0 to 1")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Places(), Tower(self.by)})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).attention.mean(0, keepdim=True)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        crop, order = tokens.signal(Places, Layout).crop, scores[0].argsort(descending=True, stable=True)
        sizes = torch.bincount(crop).tolist()
        chosen = []
        for one, count in enumerate(Budget.split(int(allocation.counts), [float(size) for size in sizes], sizes)):
            mine, important = order[crop[order] == one], int(count * self.important)
            chosen += [mine[:important], distinct(tokens.features[0], mine[important:], count - important)]
        return Plan.of(torch.cat(chosen).sort().values.unsqueeze(0), len(order))


def distinct(features: Tensor, among: Tensor, count: int) -> Tensor:
    """So many of the tokens `among` that are left when those most like others leave, a few at a time."""
    if not count:
        return among[:0]
    unit = F.normalize(features[among].float(), dim=-1)
    alike, at = unit @ unit.T, torch.arange(len(among), device=among.device)
    while leaving := min(ROUND, len(at) - count, (len(at) + 1) // 2):
        asked, others = at[::2], at[1::2]
        likest = alike[asked.unsqueeze(1), others].amax(1)
        at = torch.cat([asked[likest.argsort(descending=True, stable=True)[leaving:]], others])
    return among[at]
