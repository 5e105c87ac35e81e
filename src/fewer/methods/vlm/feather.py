"""FEATHER (Endo et al., 2024, "Feather the Throttle"): attention without the turn by positions, which favours late
tokens, and a sparse grid besides, so that no region is lost early.

    s_j          mean over heads of softmax_j(q . k_j / sqrt d), of the prompt's last token's query q and the keys k_j
                 of the visual tokens alone, none of them turned by their positions
    first cut    after a quarter of the layers: every third row and column of each crop, and then the greatest s_j
    second cut   after half of the layers: the greatest s_j of all that are left

Differs from the paper: there the first cut leaves the share r with the greatest s_j united with the grid, and the
second r^2 of those, so that counts vary; here counts are what was asked for (a third of the way, in logarithms, is gone
at the first cut), and the grid's tokens are taken first: the same tokens as the union where it has as many. A grid that
is larger than the count gives its own best. Positions are kept, as there.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.score.looking import ahead, asking
from fewer.signals.visual import Layout, Looked, Places, TextAttention
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class Feather:
    """Attention without positions in two stages, the first with a uniform grid.

    Args:
        stages: where it cuts, as shares of the depth: behind that share of the layers.
        stride: how far apart the rows and columns of the grid are.
    """

    stages: tuple[float, float] = (0.25, 0.5)
    stride: int = 3

    card: ClassVar[Card] = Card(
        source="arXiv 2412.13180",
        faithfulness="official",
        mechanism="prune",
        differs="exact counts: the grid first, then the best",
        slugs=("feather",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention(), Places()})

    def __post_init__(self) -> None:
        if len(self.stages) != 2 or not 0 < self.stages[0] < self.stages[1] < 1:
            raise FewerError(f"Feather(stages={self.stages!r}): two shares of the depth between 0 and 1, rising")
        if self.stride < 1:
            raise FewerError(
                f"Feather(stride={self.stride!r}): rows and columns from one token to the next, at least 1"
            )

    def after(self, layers: int) -> tuple[int, ...]:
        return tuple(sorted({max(0, int(share * layers) - 1) for share in self.stages}))

    def path(self, cuts: int) -> tuple[float, ...]:
        return (1 / 3, 1.0) if cuts == 2 else (1.0,)

    def score(self, tokens: Tokens) -> Tensor:
        looked = tokens.signal(TextAttention, Looked)
        query = looked.plain_query[:, asking(looked, self)[-1:]].float()
        key = looked.plain_key[:, looked.visual - looked.before].float()
        logits = query @ key.repeat_interleave(len(query) // len(key), 0).mT * looked.scaling  # (heads, 1, n)
        scores: Tensor = logits.softmax(-1).mean(0)
        if tokens.site.layer != self.after(tokens.site.layers)[0]:
            return scores
        layout = tokens.signal(Places, Layout)
        return ahead(scores, (layout.y % self.stride == 0) & (layout.x % self.stride == 0))

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
