"""Merge on eviction (LOOK-M, arXiv 2406.18139): what is evicted is merged into the most similar token that is kept.

    keep by any scorer (LOOK-M: heavy hitters and recent tokens)
    each evicted token e goes to the kept token t with the greatest cosine of keys, its value with it
    of all the e at one t:
        pivot       t' = (t + sum (e + t) / 2) / (1 + count)               LOOK-M, and merge_kv of KVCache-Factory
        average     t' = (t + sum e) / (1 + count)                         LOOK-M
        weighted    t' = (t + sum w e) / (1 + sum w), w = (cos + 1) / 2    merge_kv of KVCache-Factory

Keys are averaged as they are stored, rotated at different positions, as the authors do.

Differs from the paper: no text prior, every token is alike, and LOOK-M's first 4 tokens are not forced to stay. Its own
weighted merge (t + sum cos e over 1 + count, for tokens above the layer's mean cosine) shrinks keys and is not offered.
Its released average merge picks tokens by that mean too, but then folds others in their place; ours follows the paper.
Heavy hitters are H2O's: queries of decoding are not summed unless when="both".
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer.inner import must_evict
from fewer.methods.kv.h2o import H2O
from fewer.reduce.merge import absorb, nearest
from fewer.types import Allocation, Budget, Card, Method, Plan, Tokens, UnknownName


@dataclass(frozen=True)
class MergeEvict:
    """Merging around any scorer.

    Args:
        scorer: any method that only evicts or merges; who stays, when, and its needs, are its own.
        how: "pivot", "average" or "weighted", the formulas above.
    """

    scorer: Method = field(default_factory=H2O)
    how: str = "pivot"

    card: ClassVar[Card] = Card(
        source="arXiv 2406.18139",
        faithfulness="official",
        mechanism="merge",
        differs="no text prior; LOOK-M's weighted merge is KVCache-Factory's, which does not shrink keys",
    )

    def __post_init__(self) -> None:
        must_evict(self, self.scorer)
        if self.how not in ("pivot", "average", "weighted"):
            raise UnknownName(f"how={self.how!r}: merge by 'pivot', 'average' or 'weighted'")

    @property
    def needs(self) -> frozenset[Any]:
        return self.scorer.needs

    def score(self, tokens: Tokens) -> Tensor:
        rated: Tensor = self.scorer.score(tokens)
        return rated

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return self.scorer.allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        plan = self.scorer.reduce(tokens, scores, allocation)
        near = nearest(tokens, plan, (plan.slot < 0) & ~tokens.padding)
        even = torch.ones_like(near.cosine)
        weight = {"pivot": even / 2, "average": even, "weighted": (near.cosine + 1) / 2}[self.how]
        return absorb(plan, near.slot, weight, pull=0.5 if self.how == "pivot" else 0.0)
