"""VTC-CLS (Wang et al., 2024, "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs"): keep what the
tower's class token looks at, in several layers.

    s_j = sum over layers l of the mean over heads of A_l[class, j]     l from a start layer to the one whose features
                                                                        the language model gets
    the tokens with the greatest s_j stay, in the order of the picture

Differs from the paper: it tunes the start layer for every data set, on that set; here one share of the tower's depth
serves all, by default its upper half, which no paper chose. Layers are averaged and not summed, which orders alike.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.signals.visual import By, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class VTCCLS:
    """Attention of the tower's class token, over several layers.

    Args:
        since: the share of the tower's depth at which the layers begin; a start layer of 14 of 24 is 14 / 24.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
    """

    since: float = 0.5
    by: By = "class"

    card: ClassVar[Card] = Card(
        source="arXiv 2412.05819",
        faithfulness="official",
        mechanism="prune",
        differs="one start layer for all data, the middle of the tower",
        slugs=("vtc-cls",),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.since < 1:
            raise FewerError(f"VTCCLS(since={self.since!r}): a share of the tower's depth, from 0 to below 1")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Tower(self.by, since=self.since)})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).attention.mean(0, keepdim=True)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
