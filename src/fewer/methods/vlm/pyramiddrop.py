"""PyramidDrop (Xing et al., 2024, "Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction"): the deeper the layer, the fewer visual tokens it needs.

    s_j = mean over heads of A[last token of the prompt, j]     softmax over the whole context

After a quarter, a half and three quarters of the layers the tokens with the least s_j leave, the same share each time:
50, 25 and 12.5 % are left with the paper's numbers, which is keep=0.125 here. Of several pictures, all are asked about
by the same token, the last of the text.

Differs from the paper: A is the attention of the layer before a cut, which has been computed with all that were left
then; the authors' code computes the next layer's row once more, from the same states. Tokens keep their positions,
where the authors number them anew after every cut. Nothing is trained.
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
class PyramidDrop:
    """Attention of the prompt's last token, at several depths.

    Args:
        stages: where it cuts, as shares of the depth: behind that share of the layers.
    """

    stages: tuple[float, ...] = (0.25, 0.5, 0.75)

    card: ClassVar[Card] = Card(
        source="arXiv 2410.17247",
        faithfulness="paper",
        mechanism="prune",
        differs="attention of the layer before each cut, not of the one after; positions kept",
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention()})

    def __post_init__(self) -> None:
        if not self.stages or not all(0 < share < 1 for share in self.stages):
            raise FewerError(f"PyramidDrop(stages={self.stages!r}): shares of the depth between 0 and 1")

    def after(self, layers: int) -> tuple[int, ...]:
        return tuple(sorted({max(0, int(share * layers) - 1) for share in self.stages}))

    def score(self, tokens: Tokens) -> Tensor:
        looked = tokens.signal(TextAttention, Looked)
        return looked.attention(asking(looked, self)[-1:]).mean(0)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
