"""Turbo (arXiv 2407.11717, ECCV 2024): merge what is redundant and says little.

    R    mutual redundancy of an even token: its greatest cosine to an odd one, by keys averaged over heads
    A    semantic value: the class token's attention to it, averaged over heads
    E    R - alpha A; the r even tokens of greatest E join the odd tokens they are most like
    a merged token is the mean of its members, weighted by size, and attention adds log(size) to its logit

Differs from the paper: written from its abstract and others' summaries of it, which give E as here, or as R / A, which
is not offered. The published alpha was not found: 10, ours, lets a token that gets a hundredth of the attention pass
for a tenth less alike. That redundancy is taken between ToMe's halves and by its metric, and that sizes weigh, is read
into "bipartite". An encoder without a class token is rated by the attention each token gets from all. What the paper
restores for generation is `compress(..., restore="copy")` here.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fewer.allocate.joining import joining
from fewer.reduce.fold import fold, halves
from fewer.score.heads import attention_got, head_mean
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, FewerError, Matching, Plan, Tokens


@dataclass(frozen=True)
class Turbo:
    """Merging by information degree.

    Args:
        alpha: how much semantic value counts against redundancy; 0 is ToMe.
    """

    alpha: float = 10.0

    card: ClassVar[Card] = Card(
        source="arXiv 2407.11717",
        faithfulness="style",
        mechanism="merge",
        differs="alpha is ours; matching and metric are ToMe's",
        slugs=("turbo",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    halves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise FewerError(f"alpha={self.alpha!r}: the weight of semantic value is a number from 0 on")

    def score(self, tokens: Tokens) -> Matching:
        attended = tokens.signal(Heads, Attended)
        matching = halves(tokens, head_mean(attended.key))  # minus the redundancy, +inf for those that join nobody
        semantic = attention_got(attended, tokens.site.prefix).float()
        return matching._replace(value=matching.value + self.alpha * semantic)

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        return joining(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        return fold(tokens, scores, allocation)
