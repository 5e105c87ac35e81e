"""Token Transforming (arXiv 2506.05709): shorten by a dense matrix, of which pruning and merging are special cases.

    informative   the tokens that the class token attends to most, averaged over heads
    matrix        each old token divides itself among them by softmax(likeness / temperature), cosine of its key and
                  theirs; each new token is the mean of what it got, weighted by size: Y = W X, many to many

Towards temperature 0 every token goes whole to the informative one most like it: merging. With rows of the identity in
place of W it is pruning.

Differs from the paper: its code is not released and its text leaves open the selection, the likeness, the temperature,
the places and the direction of the softmax; all are chosen here. Keys averaged over heads and sizes are ToMe's, the
places and the equal shares at each EViT's. Class and register tokens are kept out of the mixture.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.mix import mix
from fewer.reduce.select import top_k
from fewer.score.heads import attention_got, head_mean, quarters
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
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    schedule: ClassVar[str] = "geometric"

    temperature: float = 0.05

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
        unit = F.normalize(head_mean(tokens.signal(Heads, Attended).key).float(), dim=-1)
        return mix(tokens, plan, plan.pick(unit) @ unit.transpose(-1, -2) / self.temperature)
