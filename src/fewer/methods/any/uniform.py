"""Uniform: keep tokens at even distances, whatever they say. The baseline beside random eviction.

    of a row of n tokens, the c that are nearest to 0, (n - 1) / (c - 1), 2 (n - 1) / (c - 1), ..., n - 1

Differs from the paper: there is none.

The first and the last token are among them, or the last alone where one stays. Distances are counted along the row, so
a cache that is compressed again stays even: what came since is thinned to match what was kept before.

In a text the words w_i with the greatest frac(i * (sqrt(5) - 1) / 2) stay: multiples of the golden ratio are spread
evenly, however many of them are taken.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.prompts.source import Ranking, Source
from fewer.reduce.select import top_k
from fewer.score.position import must_stay
from fewer.signals import marked_last
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced tokens."""

    card: ClassVar[Card] = Card(source="baseline", faithfulness="own")
    needs: ClassVar[frozenset[object]] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)  # all alike: only the distances choose

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        free = scores.isfinite()  # neither protected nor padding
        n, there = free.shape[-1], free.sum(-1, keepdim=True)
        wanted = (allocation.counts - (scores == torch.inf).sum(-1)).clamp(min=0).unsqueeze(-1)
        order = marked_last(free)  # the free ones last, in their order
        places = tokens.positions.masked_fill(~free, -1).gather(-1, order)
        step = torch.arange(max(1, int(wanted.max())), device=free.device)  # (c,)
        last, gaps = tokens.seen.view(-1, *[1] * (free.ndim - 1)) - 1, wanted - 1
        ideal = torch.where(gaps > 0, (2 * step * last + gaps) // (2 * gaps).clamp(min=1), last)  # (b, h, c), rounded
        after = torch.searchsorted(places, ideal).clamp(max=n - 1)
        before = (after - 1).clamp(min=0)
        nearer = ideal - places.gather(-1, before) < places.gather(-1, after) - ideal
        rank = torch.where(nearer, before, after) - (n - there)
        # where two want the same token, the second takes the next one, and enough are left for those to come
        rank = step + torch.minimum((rank - step).cummax(-1).values, there - wanted).clamp(min=0)
        taken = torch.where(step < wanted, order.gather(-1, (n - there + rank).clamp(max=n - 1)), n)
        chosen = torch.zeros(*free.shape[:-1], n + 1, dtype=torch.bool, device=free.device).scatter(-1, taken, True)
        return top_k(must_stay(scores, chosen[..., :n]), allocation)

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        return Ranking(source.words, np.arange(len(source.words), dtype=np.float64) * _GOLDEN % 1.0)


_GOLDEN = (5**0.5 - 1) / 2
