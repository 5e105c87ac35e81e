"""Mini-Monkey's scale compression (Huang et al., 2024): fine crops repeat what coarser views show, so an early layer of
the language model picks which of their tokens are worth reading.

    s_j = mean over heads and queries of A[i, j]      j: a token of a fine crop

The crop that shows the whole picture stays; of the fine crops, the tokens with the greatest s_j. Of several pictures,
each is asked about by all text after it.

Differs from the paper: written from descriptions of it, as the public code holds no compressor. The queries i are the
text tokens that come after the picture; in the paper the tokens of the coarse views ask too. The rows are those of the
layer before the cut, not of a layer run on its own. The budget is for the picture: what the whole view leaves of it
goes to the fine crops, and where it leaves nothing, the best of the whole view stay. Which crops are cut from a picture
(the paper's pyramid of scales) is the processor's affair. A model that names no whole view has fine crops alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.score.looking import ahead, asking
from fewer.signals.visual import Layout, Looked, Places, TextAttention
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class MiniMonkey:
    """Early attention chooses among fine crops.

    Args:
        layer: the first layer that reads fewer tokens, counted from 0.
    """

    layer: int = 2

    card: ClassVar[Card] = Card(
        source="arXiv 2408.02034",
        faithfulness="style",
        mechanism="prune",
        differs="text alone asks; one budget for the picture",
        slugs=("mini-monkey",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention(), Places()})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise FewerError(
                f"MiniMonkey(layer={self.layer!r}): it reads the attention of the layer before, at least 1"
            )

    def after(self, layers: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def score(self, tokens: Tokens) -> Tensor:
        looked, layout = tokens.signal(TextAttention, Looked), tokens.signal(Places, Layout)
        given = looked.attention(asking(looked, self)).mean((0, 1)).unsqueeze(0)
        return ahead(given, torch.isin(layout.crop, torch.tensor(layout.whole, device=layout.crop.device).long()))

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
