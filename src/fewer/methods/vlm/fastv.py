"""FastV (Chen et al., 2024, "An Image is Worth 1/2 Tokens After Layer 2"): after a few layers, drop what the prompt's
last token hardly looks at.

    s_j = mean over heads of A[last token, j]     A: attention of layer K - 1, softmax over the whole context

The visual tokens with the greatest s_j go on to layers K, K + 1, ..; they keep their positions. Of several pictures,
all are asked about by the same token, the last of the text.

Differs from the paper: the tokens are chosen once, when the prompt is read, as in the authors' later version with a
cache; their first one chose anew at every decoding step. One row of attention is computed, not the whole map.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.score.looking import asking
from fewer.signals.visual import Looked, TextAttention
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class FastV:
    """Attention of the prompt's last token, in one early layer.

    Args:
        layer: the first layer that reads fewer tokens, K in the paper, counted from 0.
    """

    layer: int = 2

    card: ClassVar[Card] = Card(
        source="arXiv 2403.06764",
        faithfulness="paper",
        mechanism="prune",
        differs="chosen once for all decoding steps",
        slugs=("fastv",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention()})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise FewerError(f"FastV(layer={self.layer!r}): it reads the attention of the layer before, so at least 1")

    def after(self, layers: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def score(self, tokens: Tokens) -> Tensor:
        looked = tokens.signal(TextAttention, Looked)
        return looked.attention(asking(looked, self)[-1:]).mean(0)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
