"""EMS (arXiv 2412.08521): score globally and locally, evict the worst, merge the middle into the best.

    g_j = attention that key j received, over the number of observed queries that could see it
    l_j = attention from the last w queries
    s   = g / sum g + l / sum l                                    both over the tokens before the window
    centres    the window, and the top of s before it
    evicted    of the others, the lowest that hold `evict` of all of s together: many where a head is sparse
    merged     the rest, each into the centre with the most similar key (plain mean, keys and values alike), but into
               none, the "zero class", where the cosine is below `threshold`: many go in where a head is redundant

Differs from the paper: only its abstract and summaries of it were at hand, which tell the steps and not the formulas.
How g and l are normalised, what decides between evicting and merging, the mean, and all defaults are ours; the zero
class is a slot of -1 and not an extra centre, which comes to the same. Keys are averaged as stored, each rotated at its
own position. Scores are shared by the query heads of a group. Queries of decoding are neither summed nor counted in g,
unless when="both".
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.merge import absorb, nearest
from fewer.reduce.select import top_k
from fewer.score.attention import per_head, window_attention
from fewer.score.position import latest, must_stay
from fewer.signals import Queries, QueryWindow, Received, Step
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class Seers:
    """Which real queries were observed: for each row, runs of positions, from one to before another."""

    key_bytes: ClassVar[int] = 0

    def start(self) -> "_SeersObserver":
        return _SeersObserver()


class _SeersObserver:
    lasting, nbytes = True, 0  # a few numbers a row

    def __init__(self) -> None:
        self._runs: list[list[list[int]]] = []

    def observe(self, step: Step) -> None:
        self._runs = self._runs or [[] for _ in step.padding]
        for runs, positions, padding in zip(self._runs, step.positions, step.padding, strict=True):
            real = positions[~padding].tolist()
            if real and runs and runs[-1][1] == real[0]:
                runs[-1][1] = real[-1] + 1
            elif real:
                runs.append([real[0], real[-1] + 1])

    def value(self) -> list[list[list[int]]]:
        return self._runs

    def regather(self, index: Tensor) -> None:
        """Queries that were observed stay so, whichever keys are left."""

    def rows(self, index: Tensor) -> None:
        self._runs = [[[*run] for run in self._runs[row]] for row in index.tolist()]


def seen_by(runs: list[list[list[int]]], positions: Tensor) -> Tensor:
    """How many of these queries could see each key `(b, h, n)`, at least one."""
    rows = [
        sum(((end - at.clamp(min=start)).clamp(min=0) for start, end in row), torch.zeros_like(at))
        for row, at in zip(runs, positions, strict=True)
    ]
    return torch.stack(rows).clamp(min=1)


@dataclass(frozen=True)
class EMS:
    """Evict, then merge.

    Args:
        window: last queries that give the local score, and last tokens that stay.
        evict: share of a head's score that goes with the lowest tokens, unmerged.
        threshold: least cosine of keys for a merge.
    """

    window: int = 32
    evict: float = 0.05
    threshold: float = 0.6

    card: ClassVar[Card] = Card(
        source="arXiv 2412.08521",
        faithfulness="style",
        mechanism="merge",
        differs="written from summaries: normalisation, shares of evicting and merging, and defaults are ours",
        slugs=("ems",),
    )

    def __post_init__(self) -> None:
        checks.counts(window=self.window)
        checks.numbers(evict=self.evict, threshold=self.threshold)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Received(), Seers(), Queries(last=self.window)})

    def score(self, tokens: Tokens) -> Tensor:
        observers, h = tokens.signal(Queries, QueryWindow), tokens.positions.shape[1]
        could_see = seen_by(tokens.signal(Seers, list), tokens.positions)
        local = window_attention(observers, tokens.features, tokens.positions, tokens.padding)
        window = latest(tokens, self.window)
        rated = torch.zeros_like(could_see, dtype=torch.float32)
        for part in (tokens.signal(Received, Tensor) / could_see, per_head(local, h)):
            part = part.masked_fill(window | tokens.padding, 0)
            rated = rated + part / part.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return must_stay(rated, window)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget, self.window)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        plan = top_k(scores, allocation)
        others = (plan.slot < 0) & ~tokens.padding
        rated = scores.masked_fill(~others, torch.inf).sort(dim=-1, stable=True)
        # a token goes if the lowest ones up to it hold no more than the share; each head's scores add up to 2
        low = rated.values.cumsum(-1) <= 2 * self.evict
        evicted = torch.zeros_like(others).scatter(-1, rated.indices, low)
        near = nearest(tokens, plan, others & ~evicted)
        joins = near.cosine >= self.threshold
        return absorb(plan, torch.where(joins, near.slot, -1), torch.ones_like(near.cosine))
