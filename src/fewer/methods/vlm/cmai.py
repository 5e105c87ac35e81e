"""Cross-modality attention inhibition (Yang et al., 2024, "Enhancing Instruction-Following Capability of
Visual-Language Models by Reducing Image Redundancy"): what no word is about is not looked at.

    T   text to text, V   text to image     attention, mean over heads, in one early layer
    F = T V                                 how much word i, and the words that it reads, look at token j
    s_j = max over i of F[i, j]

The words are those after the picture; of several pictures, all that come after the one that is rated.

Differs from the paper: there each pair (i, j) with a small F is masked, so that word i stops reading token j and tokens
stay; here a token leaves if all of its pairs are among the small ones: exactly the tokens that masking would leave to
nobody, at the threshold that meets the count. Other pairs are not masked. The layer is FastV's, as this was
written from the abstract and reviews. The paper's other half, `vmtc`, is a method of its own.
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
class CMAI:
    """Text-to-image attention, passed on by text-to-text attention.

    Args:
        layer: the first layer that reads fewer tokens, counted from 0.
    """

    layer: int = 2

    card: ClassVar[Card] = Card(
        source="arXiv 2411.15453",
        faithfulness="style",
        mechanism="prune",
        differs="tokens leave whose pairs would all be masked; other pairs are not masked",
        slugs=("vmtc-cmai",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention()})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise FewerError(f"CMAI(layer={self.layer!r}): it reads the attention of the layer before, so at least 1")

    def after(self, layers: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def score(self, tokens: Tokens) -> Tensor:
        looked = tokens.signal(TextAttention, Looked)
        rows = asking(looked, self)
        words = looked.attention(rows, to=looked.text[rows]).mean(0)  # (r, r)
        return (words @ looked.attention(rows).mean(0)).amax(0, keepdim=True)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
