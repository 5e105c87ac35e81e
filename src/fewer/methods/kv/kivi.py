"""KIVI (arXiv 2402.02750): every token stays, in few bits; keys by channel, values by token.

    K   groups of g neighbouring tokens in each channel      min, max of a group -> zero, scale -> codes of b bits
    V   groups of g neighbouring channels in each token
    the latest tokens stay in full precision until R of them are packed together, once and for all

Keys have channels that are large for every token, so a group should not mix channels; values have none. Attention reads
keys and values as they were during the prefill, and the packed ones after it.

Differs from the paper: values are packed with the keys of their tokens, R at a time, where the paper packs one token's
values a step and so always has R of them in full precision; while decoding, a block is packed after every R new tokens,
whatever the prompt left over, so that rows of a batch do as they would alone (up to 2R - 1 tokens then wait). Scale and
zero are float16 whatever the model computes in, and codes are worked out against these rounded numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.bits import Packed, check_bits, packed_bytes
from fewer.codec import Coded, Stores, books_of
from fewer.ragged import Counts, Ragged
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, FewerError, Phase, Plan, Tokens


@dataclass(frozen=True)
class KIVI:
    """Keys quantised by channel, values by token. It is a method that keeps everything, and a form of storage for
    others: `store="kivi-4bit"`, or `store=KIVI(...)`.

    Args:
        bits: 2, 3, 4 or 8 for each number (the authors advise 4 for models with grouped query heads).
        group: tokens of a channel, or channels of a token, that share a scale and a zero.
        residual: tokens of a head that are packed together, a multiple of `group`.

    Raises:
        FewerError: bits that cannot be packed, or groups that do not divide what they should.
    """

    bits: int = 4
    group: int = 32
    residual: int = 128

    card: ClassVar[Card] = Card(
        source="arXiv 2402.02750",
        faithfulness="official",
        mechanism="quantise",
        differs="packs values with their keys, block by block; float16 scales; up to 2 residual - 1 tokens wait",
    )
    needs: ClassVar[frozenset[object]] = frozenset()
    whole: ClassVar[bool] = True
    storage: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.counts(group=self.group, residual=self.residual)
        check_bits(self.bits)
        if self.group < 1 or self.residual < 1 or self.residual % self.group:
            raise FewerError(f"residual={self.residual} must be a multiple of group={self.group}, both at least 1")

    @property
    def store(self) -> Stores:
        return (self,)

    @property
    def block(self) -> int:
        return self.residual

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def check(self, d: int, e: int) -> None:
        if e % self.group:
            fits = [size for size in range(1, self.group) if e % size == 0 and self.residual % size == 0]
            raise FewerError(
                f"{type(self).__name__}: values of {e} features do not divide into groups of {self.group}; "
                f"choose group={fits[-1]}, or another that does"
            )
        packed_bytes(d, self.bits), packed_bytes(e, self.bits)

    def encode(self, tokens: Ragged, phase: Phase, signals: Mapping[type, Any]) -> "KIVIPart":
        return KIVIPart(
            *books_of(tokens),
            Packed.of(tokens.keys, self.bits, tokens=self.group),
            Packed.of(tokens.values, self.bits, channels=self.group),
        )

    def bytes_for(self, tokens: int, d: int, e: int, itemsize: int) -> int:
        whole = tokens // self.block * self.block
        keys = Packed.bytes_for(whole, d, self.bits, tokens=self.group)
        values = Packed.bytes_for(whole, e, self.bits, channels=self.group)
        return keys + values + (tokens - whole) * (d + e) * itemsize


@dataclass(frozen=True)
class KIVIPart(Coded):
    """Tokens of every row and head, packed as KIVI does."""

    packed_keys: Packed
    packed_values: Packed

    @property
    def cut(self) -> int:
        return self.packed_keys.tokens

    def keys(self, start: int, end: int) -> Tensor:
        return self.packed_keys[start:end].tensor(self.dtype)

    def values(self, start: int, end: int) -> Tensor:
        return self.packed_values[start:end].tensor(self.dtype)

    def spans(self, spans: Sequence[tuple[int, int]], counts: Counts) -> "KIVIPart":
        keys, values = (Packed.join([x[i:j] for i, j in spans]) for x in (self.packed_keys, self.packed_values))
        return KIVIPart(*self.books(spans, counts), self.dtype, keys, values)

    def stack(self, other: "KIVIPart") -> "KIVIPart | None":
        mine, theirs = (self.packed_keys, self.packed_values), (other.packed_keys, other.packed_values)
        if self.dtype != other.dtype or not all(a.fits(b) for a, b in zip(mine, theirs, strict=True)):
            return None
        both = [Packed.join(pair) for pair in zip(mine, theirs, strict=True)]
        return KIVIPart(*self.stacked(other), self.dtype, *both)

    @property
    def payload(self) -> tuple[int, int]:
        scales = self.packed_keys.metadata + self.packed_values.metadata
        return self.packed_keys.nbytes + self.packed_values.nbytes - scales, scales
