"""Scissorhands (arXiv 2305.17118): what was pivotal stays pivotal; drop what kept getting less than its share.

    of the last w queries, count for each token those that paid it less than the average of what they saw, 1 / t
    the r most recent tokens stay; of the others, those with the highest counts go, many at a time
    later layers keep more, since in them fewer tokens stay pivotal

Differs from the paper: the rows of the w queries are worked out again over the tokens that are still held, where the
paper counts as it goes; counts are summed over the query heads that share a key-value head; a burst is what came since
the last compression, where the paper drops half of its budget whenever that is full. What the paper's rule of budgets
over layers is, beyond more for later ones, is not known here: the straight line, its steepness and leaving short rows
even (as PyramidKV does) are ours. w and r are from a secondary source.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewer import checks
from fewer.allocate.by_layer import rising
from fewer.allocate.uniform import uniform
from fewer.attention import BLOCK_CELLS
from fewer.reduce.select import top_k
from fewer.score.attention import attention_rows
from fewer.score.position import latest, must_stay
from fewer.signals import Queries, QueryWindow, blank
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class Scissorhands:
    """Counts of below-average attention, with a budget that rises from layer to layer.

    Args:
        history: last queries that are asked.
        recent: last tokens that stay.
        beta: steepness; the first layer keeps 1 / beta of the even share (and the recent tokens).
    """

    history: int = 400
    recent: int = 10
    beta: int = 2

    card: ClassVar[Card] = Card(
        source="arXiv 2305.17118",
        faithfulness="style",
        differs="recomputes the history's rows over held tokens; the slope over layers is ours; bursts by the policy",
        slugs=("scissorhands",),
    )
    when: ClassVar[str] = "both"

    def __post_init__(self) -> None:
        checks.counts(history=self.history, beta=self.beta)
        checks.counts(0, recent=self.recent)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Queries(last=self.history)})

    def score(self, tokens: Tokens) -> Tensor:
        low = below_average(tokens.signal(Queries, QueryWindow), tokens)
        return must_stay(-low, latest(tokens, self.recent))

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return rising(tokens, budget, self.recent, self.beta, even=uniform(tokens, budget))

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)


def below_average(window: QueryWindow, tokens: Tokens) -> Tensor:
    """How often each token got less than the average from a real query that saw it: `(b, h, n)`, over query heads."""
    b, h, n = tokens.positions.shape
    heads, q = window.query.shape[1:3]
    query, keys = blank(window.query, window.padding.unsqueeze(1)), blank(tokens.features, tokens.padding)
    counts = keys.new_zeros(b, h, n).float()
    size = max(1, BLOCK_CELLS // max(1, b * heads * n))
    for start in range(0, q, size):
        at = slice(start, start + size)
        places, unreal = window.positions[:, None, at, None], window.padding[:, None, at, None]
        rows = attention_rows(
            query[:, :, at], window.positions[:, at], keys, tokens.positions, tokens.padding,
            window.scaling, window.softcap,
        )  # fmt: skip
        seen = ~(tokens.padding[:, :, None] | unreal) & (tokens.positions[:, :, None] <= places)  # (b, h, q, n)
        average = 1 / seen.sum(-1, keepdim=True).clamp(min=1)
        low = rows.view(b, h, heads // h, -1, n) < average.unsqueeze(2)
        counts += (low & seen.unsqueeze(2)).sum((2, 3))
    return counts
