"""StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window.

    keep the first `sinks` tokens and the most recent ones
    inside the cache, positions are counted 0, 1, 2, ... without gaps (section 3.2)

Keys are stored rotated here, so counting inside the cache is done by turning the sinks forward over the gap that was
evicted: every distance between query and key is then the one inside the cache, which is all that attention sees.

Differs from the paper: evicts when the policy compresses, not after every token (`when="decode", every=1` does).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.score.position import sinks_stay
from fewer.signals import Rotation
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class StreamingLLM:
    """Attention sinks and the recent window.

    Args:
        sinks: first tokens that always stay.
        positions: "cache" counts positions inside the cache as published, "original" leaves keys where they were.
    """

    sinks: int = 4
    positions: Literal["cache", "original"] = "cache"

    card: ClassVar[Card] = Card(
        source="arXiv 2309.17453",
        faithfulness="paper",
        differs="evicts when the policy compresses; after every token with when='decode', every=1",
    )

    def __post_init__(self) -> None:
        checks.counts(0, sinks=self.sinks)
        checks.words(("cache", "original"), positions=self.positions)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Rotation()} if self.positions == "cache" else ())

    def score(self, tokens: Tokens) -> Tensor:
        return sinks_stay(tokens.positions.float(), tokens, self.sinks)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        plan = top_k(scores, allocation)
        if self.positions == "original":
            return plan
        slots = torch.arange(plan.survivors.shape[-1], device=plan.slot.device)
        first = tokens.seen.view(-1, 1, 1) - plan.counts.unsqueeze(-1)
        return replace(plan, moved=first + slots)
