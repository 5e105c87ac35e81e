"""MiKV (arXiv 2402.18096): what an eviction policy would drop is kept in a few bits instead, each token by itself.

    the policy is H2O: recent tokens and heavy hitters are important, together a share of the tokens seen
    important tokens are kept as they are, or in bits_important; the others in bits_others, each over its channels
    b_c = sqrt(max |q_c| / max |k_c|) over the prompt, for each layer, head and channel c
    keys are stored as k_c * b_c, so that channels with outliers do not spoil a token's grid, and read by q_c / b_c

Differs from the paper: query heads that share a key-value head share its balancer and its heavy-hitter sum; what is
unpacked is divided by b, in place of the query, which gives the same logits; tokens become unimportant when the policy
compresses, every 64 decoded tokens, and never become important again: what was packed stays as it is, so with fewer
than 16 `bits_important` the new tokens compete among themselves only. A later prompt raises the maxima, for what is
packed from then on. Share and bits are the setting of the paper's line retrieval.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.bits import Packed, check_bits, packed_bytes
from fewer.codec import Stores
from fewer.methods.kv.h2o import H2O
from fewer.ragged import Ragged
from fewer.reduce.tiers import fresh, portion, two_tiers
from fewer.signals import ChannelMaxima, Maxima, Received
from fewer.tiers import ByToken, TierPart, run_lengths
from fewer.types import Allocation, Budget, Card, MissingSignal, Phase, Plan, Tokens


@dataclass(frozen=True)
class Balanced:
    """Keys and values by token, in 2, 3, 4 or 8 `bits`; keys with their channels balanced against the queries'."""

    bits: int

    block: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def check(self, d: int, e: int) -> None:
        packed_bytes(d, self.bits), packed_bytes(e, self.bits)

    def encode(self, tokens: Ragged, phase: Phase, signals: Mapping[type, Any]) -> TierPart:
        found = signals.get(ChannelMaxima)
        if not isinstance(found, Maxima):
            raise MissingSignal("the balancer needs ChannelMaxima, which was not gathered here")
        lengths, d = run_lengths(tokens.counts), tokens.keys.shape[-1]
        some = torch.tensor([count > 0 for row in tokens.counts for count in row])
        channel = (found.key / found.query).sqrt().view(-1, d)[some.to(tokens.keys.device)]  # 1 / b
        keys = ByToken.of(tokens.keys, self.bits, lengths, channel)
        return TierPart.of(tokens, keys, ByToken.of(tokens.values, self.bits, lengths))

    def bytes_for(self, tokens: int, d: int, e: int, itemsize: int) -> int:
        keys = Packed.bytes_for(tokens, d, self.bits, channels=d) + (2 * d if tokens else 0)
        return keys + Packed.bytes_for(tokens, e, self.bits, channels=e)


@dataclass(frozen=True)
class MiKV:
    """Mixed precision by H2O's scores; `keep` must be 1.0.

    Args:
        important: share of the tokens seen that is important, in [0, 1], rounded up.
        recent: share of those that goes to the most recent tokens.
        bits_important, bits_others: 2, 3, 4, 8, or 16 for as they are.
    """

    important: float = 0.5
    recent: float = 0.5
    bits_important: int = 16
    bits_others: int = 3

    card: ClassVar[Card] = Card(
        source="arXiv 2402.18096",
        faithfulness="paper",
        mechanism="quantise",
        differs="one balancer for grouped query heads; demotes when the policy compresses, and never promotes",
        slugs=("mikv",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({Received(), ChannelMaxima()})
    whole: ClassVar[bool] = True
    when: ClassVar[str] = "both"

    def __post_init__(self) -> None:
        checks.shares(important=self.important, recent=self.recent)
        for bits in (self.bits_important, self.bits_others):
            if bits != 16:
                check_bits(bits)

    @property
    def store(self) -> Stores:
        bits = self.bits_important, self.bits_others
        return tuple(None if b == 16 else Balanced(b) for b in bits)

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Received, Tensor)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        new = fresh(tokens)
        among = new.sum(-1) if self.store[0] is not None else tokens.seen.unsqueeze(1).expand(new.shape[:2])
        counts = torch.minimum(portion(among, self.important), new.sum(-1))
        candidates = torch.where(new, scores, -torch.inf)
        return two_tiers(tokens, H2O(self.recent).reduce(tokens, candidates, Allocation(counts)))
