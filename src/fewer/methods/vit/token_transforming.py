"""Token Transforming (arXiv 2506.05709): shorten by a dense matrix, of which pruning and merging are special cases.

    informative   the tokens that the class token attends to most, averaged over heads
    matrix        each old token divides itself among them by softmax(likeness / temperature), the cosine of features;
                  each new token is the mean of what it got, weighted by size: Y = W X, many to many

Towards temperature 0 every token goes whole to the informative one most like it: merging. With rows of the identity in
place of W it is pruning.

Differs from the paper: its code is not released and its text leaves open the selection, the likeness, the temperature,
the places and the direction of the softmax; all are chosen here. Places and the equal shares at each are EViT's, sizes
are ToMe's. The image's mean is taken off before the cosine: what all tokens share makes all cosines near 1, and every
new token the same blur. Of temperatures from 0.003 to 0.2, 0.03 left DINOv2-S nearest to itself on eight photographs,
at half of the tokens; from 0.1 on it blurs. Class and register tokens are kept out of the mixture.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.mix import likeness, mix
from fewer.reduce.select import top_k
from fewer.score.heads import attention_got, quarters
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, BudgetError, Card, Plan, Tokens, Transform


@dataclass(frozen=True)
class TokenTransforming:
    """Many-to-many aggregation.

    Args:
        temperature: what cosines are divided by; smaller is nearer to hard merging.
    """

    card: ClassVar[Card] = Card(
        source="arXiv 2506.05709",
        faithfulness="style",
        mechanism="transform",
        differs="selection, likeness, temperature and places are chosen, the paper's code being unreleased",
        slugs=("token-transforming",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    schedule: ClassVar[str] = "geometric"

    temperature: float = 0.03

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise BudgetError(
                f"TokenTransforming(temperature={self.temperature!r}): it is above 0; next to 0 it merges hard"
            )

    def places(self, layers: int) -> list[int]:
        return quarters(layers)

    def score(self, tokens: Tokens) -> Tensor:
        return attention_got(tokens.signal(Heads, Attended), tokens.site.prefix)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan | Transform:
        plan = top_k(scores, allocation)
        if bool((plan.counts == tokens.available).all()):
            return plan
        return mix(tokens, plan, likeness(tokens, plan) / self.temperature)
