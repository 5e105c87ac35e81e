"""Token-level Correlation-guided Compression (Zhang et al., 2024): a document's crop keeps more tokens if its patterns
repeat less, and those that the class token looks at.

    often_j    the share of the crop's other tokens whose key has a cosine of at least `alike` with that of token j
    density    1 - the share of the crop's tokens with often_j above `often`: patterns that repeat, such as blank paper
    kept       of each crop as many as its size times its density asks for, those of greatest s_j = mean over heads of
               A[class, j], in the layer whose features the language model gets
    merged     each other token joins the kept one of its crop whose key is most like its own; means by s_j

Differs from the paper: written from its abstract and reviews, as its repository holds no code. There the density gives
how many tokens are left, here how a count for all crops is divided among them. The two thresholds were chosen here, and
the tokens of greatest attention are taken, where the paper samples by it. Tokens of a crop that may keep none leave.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.kmeans import means
from fewer.reduce.within import top_within
from fewer.signals.visual import By, Layout, Places, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class TokenCorr:
    """Crops by how little they repeat, tokens by the tower's attention.

    Args:
        alike: the cosine of keys from which on two tokens show one pattern.
        often: the share of a crop that may show a token's pattern before it counts as repeated.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
    """

    alike: float = 0.8
    often: float = 0.05
    by: By = "class"

    card: ClassVar[Card] = Card(
        source="arXiv 2407.14439",
        faithfulness="style",
        mechanism="merge",
        differs="from the abstract and reviews; thresholds chosen here; the budget gives the count",
        slugs=("tokencorr",),
    )

    def __post_init__(self) -> None:
        if not -1 <= self.alike <= 1:
            raise FewerError(f"TokenCorr(alike={self.alike!r}): a cosine, from -1 to 1")
        if not 0 <= self.often <= 1:
            raise FewerError(f"TokenCorr(often={self.often!r}): a share of a crop, from 0 to 1")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Places(), Tower(self.by)})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).attention.mean(0, keepdim=True)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        crop = tokens.signal(Places, Layout).crop
        crops = [(crop == one).nonzero().flatten() for one in range(int(crop.max()) + 1)]
        keys = tokens.signal(Tower, TowerView).keys.transpose(0, 1).flatten(1).float()
        alike = [(unit := F.normalize(keys[mine], dim=-1)) @ unit.T for mine in crops]
        sizes = [len(mine) for mine in crops]
        worth = [size * self.density(one) for size, one in zip(sizes, alike, strict=True)]
        if not any(worth):  # nothing but repetition
            worth = [float(size) for size in sizes]
        counts = Budget.split(int(allocation.counts), worth, sizes)
        kept = top_within(scores, crop, torch.tensor(counts))
        slot = kept.slot[0].clone()
        for mine, one in zip(crops, alike, strict=True):
            stays = slot[mine] >= 0
            if bool(stays.any()):
                slot[mine[~stays]] = slot[mine[stays]][one[~stays][:, stays].argmax(-1)]
        return means(slot, scores[0], kept.survivors[0])

    def density(self, alike: Tensor) -> float:
        """The share of tokens whose pattern does not repeat, by the cosines `(n, n)` of a crop's tokens."""
        if len(alike) < 2:
            return float(len(alike))
        often = ((alike >= self.alike).sum(1) - 1) / (len(alike) - 1)
        return 1 - float((often > self.often).float().mean())
