"""ALGM (arXiv 2406.09936): neighbours merge first, then whatever is alike anywhere.

    first block          windows of 2 x 2 patches whose members are alike, by the mean cosine between them, become one
    a third of the way   ToMe's bipartite matching, on the features of all tokens
    alike enough         in windows above `threshold`; between two tokens above the mean + deviation / block's number
    a merged token is the mean of its members, weighted by size

Differs from the paper: the count is the budget's, unless `threshold` is given, and the windows (then pairs) most alike
are merged first; the window at the edge of the budget gives up only as many tokens as are asked, its first ones.
Every row decides for itself, where the authors' code merges in all rows as many as the row with the fewest may.
Attention counts sizes here; the authors' code tracks them and does not use them: `compress(..., masses="off")`. Tokens
stay in the order of the image, so the second block pairs others than the authors', who list merged windows first; on
the same tokens the pairs are the same. Grids need not be square, or even: what fills no window is left for later.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fewer.allocate.joining import joining
from fewer.reduce.fold import fold, halves
from fewer.reduce.windows import windows
from fewer.types import Allocation, Budget, BudgetError, Card, Matching, Plan, Tokens


@dataclass(frozen=True)
class ALGM:
    """Adaptive local-then-global merging.

    Args:
        threshold: cosine above which a window merges. Given, it and its sibling for pairs say how many merge, an image
            at a time, and the budget is only the least that stays: the paper's way, with 0.88 for ViT-S, 0.9 for
            ViT-Ti, 0.94 for ViT-B and 0.95 for ViT-L on ADE20K. None merges to the budget's count.
    """

    threshold: float | None = None

    card: ClassVar[Card] = Card(
        source="arXiv 2406.09936",
        faithfulness="official",
        mechanism="merge",
        differs="the budget's count where the paper has thresholds; rows decide alone; tokens keep the image's order",
    )
    needs: ClassVar[frozenset[Any]] = frozenset()
    schedule: ClassVar[str] = "geometric"
    grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise BudgetError(
                f"threshold={self.threshold!r} is no cosine: give one in [-1, 1], or None for the budget's"
            )

    @property
    def exact(self) -> bool:
        """Whether the count is the budget's."""
        return self.threshold is None

    @property
    def floor(self) -> bool:
        """Whether the budget is the least that stays."""
        return self.threshold is not None

    def places(self, layers: int) -> list[int]:
        """The first and fifth of twelve blocks, the first and seventh of 24, and the like at other depths."""
        return [0, 6 if layers == 24 else round(layers / 3)]

    def score(self, tokens: Tokens) -> Matching:
        return halves(tokens, tokens.features) if tokens.site.place else windows(tokens, tokens.features)

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        asked = joining(tokens, scores, budget)
        if self.threshold is None:
            return asked
        able, alike = scores.value.isfinite(), -scores.value  # (b, n), of those that may join
        least = torch.full_like(alike[:, :1], self.threshold)
        if tokens.site.place:
            many = able.sum(-1, keepdim=True).clamp(min=1)
            mean = alike.masked_fill(~able, 0).sum(-1, keepdim=True) / many
            apart = (alike - mean).masked_fill(~able, 0).square().sum(-1, keepdim=True) / (many - 1).clamp(min=1)
            least = mean + apart.sqrt() / (tokens.site.layer + 1)
        joins = (able & (alike >= least)).sum(-1)
        return Allocation(torch.maximum(asked.counts, tokens.available - joins))

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        return fold(tokens, scores, allocation)
