"""Expected Attention (arXiv 2510.00636): how much attention will future queries pay, in expectation?

    mu, C = mean and covariance of the queries before rotation, first tokens left out
    R     = mean rotation of the next `future` positions
    z_j   = k_j . R mu * scale + k_j . (R C R^T) k_j * scale^2 / 2
    s_j   = (mean over the group of softmax(z)_j + eps) * ||v_j||

Differs from the paper: nothing known in the scores. The published leaderboard line puts AdaKV around them with
eps = 0.01: `AdaKV(ExpectedAttention(eps=0.01))`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.position import sinks_stay
from fewer.signals import Moments, QueryMoments
from fewer.types import Allocation, Budget, Card, FewerError, Plan, Tokens


@dataclass(frozen=True)
class ExpectedAttention:
    """Expected attention of future queries, times the value's norm.

    Args:
        future: upcoming positions to average over.
        sinks: first tokens that always stay, and whose queries are not counted.
        eps: added to the expected attention before the value's norm.
    """

    future: int = 512
    sinks: int = 4
    eps: float = 0.0

    card: ClassVar[Card] = Card(source="arXiv 2510.00636", faithfulness="official")

    def __post_init__(self) -> None:
        checks.counts(future=self.future)
        checks.counts(0, sinks=self.sinks)
        checks.numbers(eps=self.eps)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Moments(skip=self.sinks)})

    def score(self, tokens: Tokens) -> Tensor:
        moments = tokens.signal(Moments, QueryMoments)
        if tokens.values is None:
            raise FewerError("ExpectedAttention weighs keys by their values; this place has none")
        keys, sinks = tokens.features.float(), tokens.positions < self.sinks
        b, h, _, d = keys.shape
        groups = moments.mean.shape[1] // h
        turns = self._turns(moments)  # (b, 1, d, d)
        mean = (turns @ moments.mean.unsqueeze(-1)).view(b, h, groups, d)
        covariance = (turns @ moments.covariance @ turns.transpose(-1, -2)).view(b, h, groups, d, d)
        logits = mean @ keys.transpose(-1, -2) * moments.scaling  # (b, h, groups, n)
        for group in range(groups):  # one at a time: (b, h, n, d) is the largest thing held
            logits[:, :, group] += (keys @ covariance[:, :, group] * keys).sum(-1) * (moments.scaling**2 / 2)
        ignored = (tokens.padding | sinks).unsqueeze(2)
        expected = logits.masked_fill(ignored, torch.finfo(torch.float32).min).softmax(-1).mean(2)  # (b, h, n)
        return sinks_stay((expected + self.eps) * tokens.values.float().norm(dim=-1), tokens, self.sinks)

    def _turns(self, moments: QueryMoments) -> Tensor:
        """The mean rotation of each row's upcoming positions."""
        ahead = torch.arange(self.future, device=moments.mean.device)
        starts = moments.upcoming.tolist()
        turns = {start: moments.rotary.mean_matrix(start + ahead) for start in set(starts)}
        return torch.stack([turns[start] for start in starts]).unsqueeze(1)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)
