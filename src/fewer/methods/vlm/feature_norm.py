"""Feature norm: keep the tokens with the longest features. A baseline that looks at nothing else.

    s_j = |x_j|

Differs from the paper: there is none. A method that loses to this at a budget is not to be recommended there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class FeatureNorm:
    """The longest features stay.

    Args:
        shortest: keep the shortest instead.
    """

    shortest: bool = False

    card: ClassVar[Card] = Card(source="a baseline", faithfulness="own", mechanism="prune")
    needs: ClassVar[frozenset[Any]] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        norm: Tensor = tokens.features.float().norm(dim=-1)  # (1, n)
        return -norm if self.shortest else norm

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
