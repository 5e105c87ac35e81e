"""GEAR (arXiv 2403.05527): few bits, and two cheap corrections of what they lose.

    X  =  D + L + S
    S   the largest and the smallest numbers, exact; for D each is replaced by the mean of its vector
    D   the rest in b bits, in groups of g: keys by channel, values by token, as in KIVI
    L   the error X - D - S of a head's tokens, of rank r, found by power iteration

The low-rank part is what the errors of many tokens share, the sparse part what would stretch a group's grid; numbers
that have neither, as normal ones, are better off with smaller groups for the same bytes. GEAR-L is `sparsity=0.0`.

Differs from the paper: of its two backbones only KIVI's groups are here. Outliers are found among g tokens of one head
at a time, by their distance from the mean of their channel (keys) or token (values), where the paper takes as many from
each channel of the prompt and from each token over all heads; so a small share is not rounded to none, and heads may
hold different tokens. They are exact at the end; the authors' code adds the low-rank part to them. That code has
b^2 - 1 steps where there are outliers, which is 2^b - 1 for 2 and 4 bits only. The power iteration starts from a fixed
seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.bits import check_bits, packed_bytes
from fewer.codec import Coded, Stores, books_of
from fewer.mended import Mended
from fewer.ragged import Counts, Ragged
from fewer.reduce.select import top_k
from fewer.tiers import run_lengths
from fewer.types import Allocation, Budget, Card, FewerError, Phase, Plan, Tokens


@dataclass(frozen=True)
class GEAR:
    """Few bits, a low-rank correction and exact outliers. It is a method that keeps everything, and a form of storage
    for others: `store="gear-2bit"`, or `store=GEAR(...)`.

    Args:
        bits: 2, 3, 4 or 8 for each number.
        group: tokens of a channel, or channels of a token, that share a scale and a zero.
        rank: of the correction of what a prefill packs in one head.
        rank_decode: of the correction of each block packed while decoding.
        sparsity: share of the numbers that are kept exact, one half from each end; 0 for none (GEAR-L).
        block: tokens of a head that are packed together, a multiple of `group`.

    Raises:
        FewerError: bits that cannot be packed, groups that do not divide what they should, ranks above the size.
    """

    bits: int = 2
    group: int = 64
    rank: int = 4
    rank_decode: int = 2
    sparsity: float = 0.02
    block: int = 64

    card: ClassVar[Card] = Card(
        source="arXiv 2403.05527",
        faithfulness="paper",
        mechanism="quantise",
        differs="outliers by group of tokens and head, exact at the end; a fixed seed",
        slugs=("gear",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()
    whole: ClassVar[bool] = True
    storage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.counts(group=self.group, block=self.block)
        checks.counts(0, rank=self.rank, rank_decode=self.rank_decode)
        check_bits(self.bits)
        if self.group < 1 or self.block < 1 or self.block % self.group:
            raise FewerError(f"block={self.block} must be a multiple of group={self.group}, both at least 1")
        if not 0 <= self.sparsity < 1:
            raise FewerError(f"sparsity={self.sparsity!r} is not a share in [0, 1)")

    @property
    def store(self) -> Stores:
        return (self,)

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def check(self, d: int, e: int) -> None:
        if e % self.group:
            raise FewerError(f"GEAR: values of {e} features do not divide into groups of {self.group}; choose another")
        most = min(d, e, self.block)
        if not (0 <= self.rank <= most and 0 <= self.rank_decode <= most):
            raise FewerError(f"GEAR: rank={self.rank} and rank_decode={self.rank_decode} must lie in [0, {most}]")
        packed_bytes(d, self.bits), packed_bytes(e, self.bits)

    def encode(self, tokens: Ragged, phase: Phase, signals: Mapping[type, Any]) -> "GEARPart":
        lengths, rank = run_lengths(tokens.counts), self.rank if phase == "prefill" else self.rank_decode
        how = self.bits, self.group, self.sparsity, rank
        return GEARPart(
            *books_of(tokens),
            Mended.of(tokens.keys, lengths, *how, by_token=False),
            Mended.of(tokens.values, lengths, *how, by_token=True),
        )

    def bytes_for(self, tokens: int, d: int, e: int, itemsize: int) -> int:
        whole = tokens // self.block * self.block
        how = self.bits, self.group, self.sparsity, self.rank
        keys = Mended.bytes_for(whole, d, *how, by_token=False)
        values = Mended.bytes_for(whole, e, *how, by_token=True)
        return keys + values + (tokens - whole) * (d + e) * itemsize


@dataclass(frozen=True)
class GEARPart(Coded):
    """Tokens of every row and head, packed as GEAR does."""

    mended_keys: Mended
    mended_values: Mended

    @property
    def cut(self) -> int:
        return self.mended_keys.group

    def keys(self, start: int, end: int) -> Tensor:
        return self.mended_keys.tensor(start, end, self.dtype)

    def values(self, start: int, end: int) -> Tensor:
        return self.mended_values.tensor(start, end, self.dtype)

    def spans(self, spans: Sequence[tuple[int, int]], counts: Counts) -> "GEARPart":
        both = (x.take(spans) for x in (self.mended_keys, self.mended_values))
        return GEARPart(*self.books(spans, counts), self.dtype, *both)

    def stack(self, other: "GEARPart") -> "GEARPart | None":
        pairs = (self.mended_keys, other.mended_keys), (self.mended_values, other.mended_values)
        if self.dtype != other.dtype or not all(one.fits(two) for one, two in pairs):
            return None
        return GEARPart(*self.stacked(other), self.dtype, *(one.join(two) for one, two in pairs))

    @property
    def payload(self) -> tuple[int, int]:
        (numbers, others), (more, rest) = self.mended_keys.payload, self.mended_values.payload
        return numbers + more, others + rest
