"""LagKV (arXiv 2504.04704): keep what stands out against the tokens that follow it; no attention is looked at.

    after the sinks, cut the tokens into partitions of `lag`; K_p and V_p are partition p's keys and values
    x = (K_p - min K_{p+1}) / (max K_{p+1} - min K_{p+1})        channel by channel, over the next partition's tokens
    s = softmax of std(x) over channels, inside the partition; the mean of K's and V's; then its rank there, over lag
    the sinks, the last whole partition and what comes after it stay

Differs from the paper: as in its author's code for kvpress, the budget is met by the best ranks over all partitions,
where the paper takes as many from each; when a cache is compressed again it is cut anew, where the paper lets a
partition be once it was compressed. Rows of less than the sinks and two partitions keep their latest tokens, as there.
A budget below the sinks and the tail keeps these alone, by their age: no score is used.
Channels that are constant over a partition, for which the formula divides by zero, are only shifted.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.position import sinks_stay
from fewer.types import Allocation, Budget, Card, MissingSignal, Plan, Tokens


@dataclass(frozen=True)
class LagKV:
    """Spread of keys and values, as measured by the next partition.

    Args:
        lag: tokens of a partition.
        sinks: first tokens that always stay.
    """

    lag: int = 128
    sinks: int = 4

    card: ClassVar[Card] = Card(
        source="arXiv 2504.04704",
        faithfulness="official",
        differs="best ranks over all partitions, not as many from each; partitions are cut anew at each compression",
    )
    needs: ClassVar[frozenset[object]] = frozenset()

    def __post_init__(self) -> None:
        checks.counts(lag=self.lag)
        checks.counts(0, sinks=self.sinks)

    def score(self, tokens: Tokens) -> Tensor:
        if tokens.values is None:
            raise MissingSignal("LagKV reads keys and values, and there are no values here")
        n = tokens.positions.shape[-1]
        sinks = (tokens.positions < self.sinks) & ~tokens.padding
        rest = (tokens.available - sinks.sum(-1)).unsqueeze(-1)  # (b, h, 1)
        rank = torch.arange(n, device=rest.device) - (n - rest)  # among the tokens after the sinks
        whole = rest // self.lag
        # short rows go by age; in others everything stays that no partition judges
        scores = torch.where(whole < 2, rank / rest.clamp(min=1), 1.0)
        if (most := int(whole.max())) > 1:
            at = (n - rest + torch.arange(most * self.lag, device=rest.device)).clamp(max=n - 1)
            spread = self._stands_out(tokens.features, at) + self._stands_out(tokens.values, at)
            ranks = spread.argsort(-1).argsort(-1)  # (b, h, p, lag)
            judged = rank.div(self.lag, rounding_mode="floor").clamp(min=-1)
            inside = (judged >= 0) & (judged < whole - 1)
            own = (ranks / self.lag).flatten(-2).gather(-1, rank.clamp(0, (most - 1) * self.lag - 1))
            scores = torch.where(inside, own, scores)
        return sinks_stay(scores, tokens, self.sinks)

    def _stands_out(self, x: Float[Tensor, "b h n d"], at: Tensor) -> Float[Tensor, "b h p lag"]:
        """Each token's share of its partition's spread, for all partitions but the last."""
        cut = x.float().gather(2, at.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
        parts = cut.reshape(*at.shape[:2], -1, self.lag, x.shape[-1])  # (b, h, p + 1, lag, d)
        low, high = parts[:, :, 1:].amin(-2, keepdim=True), parts[:, :, 1:].amax(-2, keepdim=True)
        width = torch.where(high > low, high - low, 1.0)
        shares: Tensor = ((parts[:, :, :-1] - low) / width).std(-1).softmax(-1)
        return shares

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
