"""EViT (arXiv 2202.07800, sections 3.2 and 3.3): keep the attentive tokens, fuse the others into one.

    a         the class token's attention to each token, averaged over heads
    keep      the tokens of greatest a, the same share at three places, a quarter, half and three quarters of the way
    fuse      one more token: the sum of all others, each times its a; later it is a token like any other

The fused token is counted within the budget: of `keep` tokens it is one. Its place, and so its position, is that of the
best of those that went into it.

Differs from the paper: the fused token stands where that best one stood, in the order of the image, and not at the end;
attention does not see the order. The keep rate of each place follows from the share that is to be left. An encoder
without a class token is rated by the attention each token gets from all, and what it gets is its weight.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.fold import fuse_rest
from fewer.score.heads import attention_got, quarters
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class EViT:
    """Pruning by the class token's attention, with what is left over in one fused token. The authors train encoders
    with it; untrained ones see a fused token much smaller than others, unless it is `normalised`.

    Args:
        normalised: make the fused token a mean: its attentions are scaled to sum to one.
    """

    normalised: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2202.07800",
        faithfulness="official",
        mechanism="merge",
        differs="the fused token stands at the best of its members, and counts within the budget",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    schedule: ClassVar[str] = "geometric"
    masses: ClassVar[str] = "off"

    @property
    def rescales(self) -> bool:
        """Whether members that are alike come out of the fused token smaller than they went in."""
        return not self.normalised

    def places(self, layers: int) -> list[int]:
        return quarters(layers)

    def score(self, tokens: Tokens) -> Tensor:
        return attention_got(tokens.signal(Heads, Attended), tokens.site.prefix)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return fuse_rest(tokens, scores, allocation, self.normalised)
