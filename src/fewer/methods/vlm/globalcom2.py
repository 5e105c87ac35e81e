"""GlobalCom2 (Liu et al., 2025, "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs
Acceleration"): a picture's thumbnail says how many tokens each of its crops may keep, and helps to say which.

    a          mean over heads of the class token's logits, before the softmax, in the tower's last layer
    S_i        sum of the thumbnail's a over the part of the picture that crop i shows
    r_i      = r * (1 + w_i - mean w),  w = softmax(S / 10)        share of crop i that stays; the thumbnail's is r
    s_j      = a_j / |a of its crop| + g_j / |g of its crop|       g: the thumbnail's a, enlarged to the crops' places;
                                                                   the thumbnail's own tokens: a_j

Differs from the paper: shares become counts by largest remainder, so that all of a picture's add up to what was asked
for; the authors round each crop's down. A part of the thumbnail belongs to the crop that its middle lies in. Pictures
that were not cut up keep their tokens of greatest a.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.within import top_within
from fewer.score import crops
from fewer.signals.visual import By, Layout, Places, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class GlobalCom2:
    """The thumbnail's attention, over crops and inside them.

    Args:
        temperature: by which the crops' sums are divided before their softmax.
        layer: of the tower; None is the one whose features the language model gets.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
    """

    temperature: float = 10.0
    layer: int | None = -1
    by: By = "class"

    card: ClassVar[Card] = Card(
        source="arXiv 2501.05179",
        faithfulness="paper",
        mechanism="prune",
        differs="scores and shares as in the authors' code; counts add up exactly",
        slugs=("globalcom2",),
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise FewerError(f"GlobalCom2(temperature={self.temperature!r}): above 0, such as 10")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Places(), Tower(self.by, self.layer)})

    def score(self, tokens: Tokens) -> Tensor:
        layout, a = tokens.signal(Places, Layout), self._logits(tokens)
        count = len(layout.grids)
        both = crops.unit(a, layout.crop, count)
        both = both + crops.unit(crops.enlarged(layout, a, "GlobalCom2"), layout.crop, count)
        whole = torch.isin(layout.crop, torch.tensor(layout.whole, device=a.device))
        return torch.where(whole, a, both).unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        layout = tokens.signal(Places, Layout)
        sizes = torch.bincount(layout.crop, minlength=len(layout.grids))
        weights = (sizes * self.shares(tokens)).tolist()
        counts = Budget.split(int(allocation.counts), weights, sizes.tolist())
        return top_within(scores, layout.crop, torch.tensor(counts))

    def shares(self, tokens: Tokens) -> Tensor:
        """What each crop may keep of its tokens, over what a thumbnail may."""
        layout = tokens.signal(Places, Layout)
        sums = crops.summed(layout, self._logits(tokens), "GlobalCom2") / self.temperature
        picture = crops.pictures(layout)
        part = torch.ones(len(sums), dtype=torch.bool, device=sums.device)
        part[list(layout.whole)] = False
        shares = torch.ones_like(sums)
        for one in sorted(set(picture[part].tolist())):
            mine = part & (picture == one)
            soft = sums[mine].softmax(0)
            shares[mine] = 1 + soft - soft.mean()
        return shares

    def _logits(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).logits.mean(0)
