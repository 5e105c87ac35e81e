"""A2SF (arXiv 2407.20485): heavy hitters that forget, so that old tokens do not win by their age alone.

    A_n(j) = a A_{n-1}(j) + S_n(j)        that is  sum_q a^(n - q) S_q(j)        for the queries q = 1 .. n
    keep the last r tokens, and the top of A among the others

Differs from the paper: scores are summed over the query heads that share a key-value head, as the authors' code does;
evicts when the policy compresses (their code after the prompt only, the paper after every token). Queries of decoding
are not summed unless when="both", but what was summed before them ages by them. The defaults are those of their code, a
factor of 0.95 and 16 recent tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.position import latest, must_stay
from fewer.signals import Received
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class A2SF:
    """Accumulated attention with a forgetting factor.

    Args:
        factor: what a query's attention is multiplied by for every query after it; 1 is H2O's sum, 0 the last row.
        recent: last tokens that stay.
    """

    factor: float = 0.95
    recent: int = 16

    card: ClassVar[Card] = Card(
        source="arXiv 2407.20485",
        faithfulness="official",
        differs="evicts when the policy compresses; after every token with when='both', every=1",
        slugs=("a2sf",),
    )

    def __post_init__(self) -> None:
        checks.shares(factor=self.factor)
        checks.counts(0, recent=self.recent)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Received(self.factor)})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Received, Tensor)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(must_stay(scores, latest(tokens, self.recent)), allocation)
