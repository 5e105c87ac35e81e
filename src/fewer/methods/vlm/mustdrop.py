"""MustDrop (Liu et al., 2024, "Multi-Stage Vision Token Dropping"): merge where neighbours are alike, then drop what no
word needs, but never what the tower holds to be the key.

    merge   windows of 3 x 3 tokens, first those with the greatest mean cosine between their tokens, become one token
            each, their mean, at the place of the last
    key     the 8 % of tokens with the greatest attention of the class token in the tower's last layer
    drop    after four layers, j leaves if  sum_i A[i, j] < g sum_ij A[i, j]  and  max_i A[i, j] < e  and j is no key;
            A: mean over heads, i: text after the picture; g = e = 0.001
    final   once the prompt is read, the first layers' caches are cut to the tokens that the last layer has

Of several pictures, each is asked about by all text after it.

Differs from the paper: thresholds become budgets. The paper merges windows above a cosine of 0.8; here as many as the
count at the first cut wants, the last of them in part (its tokens most like its last), in larger windows where 3 x 3
cannot meet it. At a later cut g and e are multiplied by the one factor that meets the count. Where the key set alone is
too large, the rule chooses among it. Windows are merged where the language model begins, not after the tower's first
layer, so the tower is no faster; the key set is a share of the picture's tokens before merging. Positions are kept.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.neighbours import merge_windows
from fewer.reduce.select import top_k
from fewer.score.looking import ahead, asking
from fewer.signals.visual import By, Layout, Looked, Places, TextAttention, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class MustDrop:
    """Merged windows before the first layer, then a dual filter by text with a protected key set.

    Args:
        window: rows and columns of a window.
        key: the share of the picture's tokens that is the key set.
        total, single: g and e above, of which the ratio matters.
        stages: the layers after which it drops, of 32; other depths are cut at the same shares of theirs.
        by: whose attention makes the key set, see `fewer.signals.visual.Tower`.
    """

    window: int = 3
    key: float = 0.08
    total: float = 0.001
    single: float = 0.001
    stages: tuple[int, ...] = (2, 6, 10, 14)
    by: By = "class"

    final: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        source="arXiv 2411.10803",
        faithfulness="paper",
        mechanism="merge",
        differs="budgets for thresholds; windows merged after the projector",
        slugs=("mustdrop",),
    )

    def __post_init__(self) -> None:
        if self.window < 2:
            raise FewerError(f"MustDrop(window={self.window!r}): at least 2 rows and columns make a window")
        if not 0 <= self.key <= 1:
            raise FewerError(f"MustDrop(key={self.key!r}): a share of the picture's tokens, from 0 to 1")
        if self.total <= 0 or self.single <= 0:
            raise FewerError(f"MustDrop(total={self.total!r}, single={self.single!r}): thresholds above 0")
        if not self.stages or not all(0 <= stage < 31 for stage in self.stages):
            raise FewerError(f"MustDrop(stages={self.stages!r}): layers of 32 after which it cuts, from 0 to 30")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Places(), Tower(self.by, -1), TextAttention()})

    def after(self, layers: int) -> tuple[int, ...]:
        return (-1, *sorted({min(stage * layers // 32, layers - 2) for stage in self.stages}))

    def score(self, tokens: Tokens) -> Tensor:
        if tokens.site.layer < 0:
            return torch.zeros_like(tokens.positions, dtype=torch.float32)  # windows are rated, not tokens
        looked, layout = tokens.signal(TextAttention, Looked), tokens.signal(Places, Layout)
        given = looked.attention(asking(looked, self)).mean(0)  # (text, n)
        both = torch.maximum(given.sum(0) / given.sum() / self.total, given.amax(0) / self.single)
        seen = tokens.signal(Tower, TowerView).attention.mean(0)
        size = math.ceil(self.key * sum(h * w for h, w in layout.grids))
        best = torch.zeros_like(seen, dtype=torch.bool)
        best[seen.argsort(descending=True, stable=True)[:size]] = True
        return ahead(both.unsqueeze(0), best)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        if tokens.site.layer >= 0:
            return top_k(scores, allocation)
        layout = tokens.signal(Places, Layout)
        return merge_windows(tokens.features, layout, self.window, int(allocation.counts))
