"""ZipCache (arXiv 2405.14256): more bits for the tokens that queries look at, fewer for the others; nothing is dropped.

    probes  = the last 5 % of the prompt's queries, and 5 % drawn from the others
    s_j     = attention of the probes to j, summed over them and the group's heads / queries of the prompt that see j
    the top 60 % of each key-value head in 4 bits, the others in 2
    keys    by channel; values by token, after each channel j was divided by sqrt(max |v_j|)
    while decoding, every 100 tokens the new ones are split so by the current query, which sees all of them

Differs from the paper: each class has channel numbers of its own for its values, where the paper has them over both,
and a token's extremes are a head's, where the authors' code takes them over all heads of a layer (whose i-th tokens
need not be the same one). Probes are drawn without replacement, and of each forward: a later chunk or turn has its own.
What was packed stays as it is, where the authors' code unpacks everything every 100 tokens and packs it again.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.bits import check_bits
from fewer.codec import Stores
from fewer.reduce.select import top_k
from fewer.reduce.tiers import fresh, portion, two_tiers
from fewer.score.probes import onlookers, probe_attention
from fewer.signals import Probes
from fewer.tiers import ChannelSeparable
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class ZipCache:
    """Mixed precision by normalised attention of probes; `keep` must be 1.0.

    Args:
        important: share of the tokens that gets `bits_important`, in [0, 1], rounded up.
        bits_important, bits_others: 2, 3, 4 or 8.
        probes: share of the last queries that probe; as many are drawn from the others.
        seed: of the draw.
    """

    important: float = 0.6
    bits_important: int = 4
    bits_others: int = 2
    probes: float = 0.05
    seed: int = 0

    card: ClassVar[Card] = Card(
        source="arXiv 2405.14256",
        faithfulness="official",
        mechanism="quantise",
        differs="channel numbers of values are each class's own; extremes of values are a head's; packs only once",
        slugs=("zipcache",),
    )
    whole: ClassVar[bool] = True
    when: ClassVar[str] = "both"
    every: ClassVar[int] = 100

    def __post_init__(self) -> None:
        checks.shares(important=self.important)
        checks.shares(some=True, probes=self.probes)
        checks.counts(None, seed=self.seed)
        for bits in (self.bits_important, self.bits_others):
            check_bits(bits)

    @property
    def store(self) -> Stores:
        return ChannelSeparable(self.bits_important), ChannelSeparable(self.bits_others)

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Probes(self.probes, self.seed)})

    def score(self, tokens: Tokens) -> Tensor:
        return probe_attention(tokens) / onlookers(tokens)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        new = fresh(tokens)
        counts = portion(new.sum(-1), self.important)
        return two_tiers(tokens, top_k(torch.where(new, scores, -torch.inf), Allocation(counts)))
