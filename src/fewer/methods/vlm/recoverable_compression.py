"""Recoverable Compression (Chen et al., 2024, "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism
Guided by Text Information"): keep what the tower looks at, take back what the question is about, merge the rest.

    kept       the tokens of greatest attention a of the class token, as many as a has outliers (local outlier factor)
    recovered  of the others, those most like the question, as many as their likeness t has outliers
    centres    of the rest, those of greatest a, as many as it has outliers there: centre + sum of a_j x_j over the 32
               tokens j of greatest cosine of keys + 50 t_j / sqrt(768)
    the rest   one token: the sum of a_j x_j

Differs from the paper: the budget says how many tokens are left, and the outliers only in which parts: kept, recovered
and merged. t is the cosine of a token's features and the mean of the question's, both as the language model reads them;
theirs is that of CLIP's own text encoder. a is the mean over heads; their code takes all heads as one. Sums are divided
by their weights; `official=True` leaves them sums, as the authors do, which makes the last token short, and counts
centres as their code does: the outliers' share of the rest, times the number of tokens kept and recovered.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.score.outliers import outliers
from fewer.signals.visual import By, Question, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens, Transform


@dataclass(frozen=True)
class RecoverableCompression:
    """Attention, then the question, then centres of what is left.

    Args:
        nearest: tokens that join each centre.
        pull: how much being like the question counts in joining one, beside the cosine of keys.
        layer: of the tower; None is the one whose features the language model gets.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
        official: add, and count centres, as the authors' code does.
    """

    nearest: int = 32
    pull: float = 50 / 768**0.5
    layer: int | None = -1
    by: By = "class"
    official: bool = False

    card: ClassVar[Card] = Card(
        source="arXiv 2409.01179",
        faithfulness="paper",
        mechanism="transform",
        differs="the budget gives the count; the question as the language model reads it; means, not sums",
        slugs=("recoverable-compression",),
    )

    def __post_init__(self) -> None:
        if self.nearest < 1:
            raise FewerError(f"RecoverableCompression(nearest={self.nearest!r}): at least 1 token, such as 32")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Tower(self.by, self.layer), Question()})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).attention.mean(0, keepdim=True)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Transform:
        keep, a = int(allocation.counts), scores[0]
        if keep == len(a):
            return Transform.of(Plan.of(torch.arange(keep, device=a.device).unsqueeze(0), keep))
        asked = F.normalize(tokens.signal(Question, Tensor)[0].float().mean(0), dim=-1)
        like = F.normalize(tokens.features[0].float(), dim=-1) @ asked
        parts = Budget.split(keep, [float(x) for x in self._parts(a, like)], [keep] * 3)
        kept = a.argsort(descending=True, stable=True)[: parts[0]]
        free = _without(torch.ones_like(a, dtype=torch.bool), kept)
        recovered = _best(like, free, parts[1])
        free = _without(free, recovered)
        matrix = torch.eye(len(a), device=a.device)
        last = recovered[:0]
        if parts[2]:
            centres = _best(a, free, parts[2] - 1)
            rest = _without(free, centres)
            last = _best(a, rest, 1)
            matrix[centres] = self._joined(tokens, a, like.masked_fill(~free, like.min()), free, centres)
            shares = torch.where(rest, a.clamp(min=1e-30), 0)
            matrix[last] = shares if self.official else shares / shares.sum()
            kept = torch.cat([kept, centres])
        survivors = torch.cat([kept, recovered, last]).sort().values
        return Transform(matrix[survivors].unsqueeze(0), survivors.unsqueeze(0))

    def _parts(self, a: Tensor, like: Tensor) -> tuple[int, int, int]:
        """How many would be kept, recovered and merged, if their outliers had the say."""
        n, k = len(a), 20
        kept = outliers(a, k)
        free = _without(torch.ones_like(a, dtype=torch.bool), a.argsort(descending=True, stable=True)[:kept])
        share = outliers(like.masked_fill(~free, like.min()), k) / n
        recovered = int((n - kept) * share)
        rest = a[_without(free, _best(like, free, recovered))]
        of = kept + recovered if self.official else len(rest)
        return kept, recovered, 1 + int(of * outliers(rest, k // 2) / max(1, len(rest)))

    def _joined(self, tokens: Tokens, a: Tensor, like: Tensor, free: Tensor, centres: Tensor) -> Tensor:
        """Every centre as a mixture of itself and those that join it, `(centres, n)`."""
        keys = F.normalize(tokens.signal(Tower, TowerView).keys.transpose(0, 1).flatten(1).float(), dim=-1)
        near = (keys[centres] @ keys.T + self.pull * like).masked_fill(~free, -torch.inf)
        near.scatter_(1, centres.unsqueeze(1), -torch.inf)
        joins = near.topk(min(self.nearest, int(free.sum()) - 1), dim=-1).indices
        shares = torch.zeros_like(near).scatter(1, joins, a[joins]).scatter(1, centres.unsqueeze(1), 1.0)
        return shares if self.official else shares / shares.sum(1, keepdim=True)


def _best(values: Tensor, among: Tensor, count: int) -> Tensor:
    """The so many tokens `among` these of greatest value; the first of equals."""
    return values.masked_fill(~among, -torch.inf).argsort(descending=True, stable=True)[:count]


def _without(among: Tensor, gone: Tensor) -> Tensor:
    return among.index_fill(0, gone, False)
