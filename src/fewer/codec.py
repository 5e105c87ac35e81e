"""Fewer bits instead of fewer tokens: what every form of packed storage must do, and what the packed parts share.

    encode(tokens, phase, signals)  ->  a Part that attention reads; what was packed is never packed again
    bytes_for(tokens, d, e, size)   ->  its exact bytes, all metadata included, before anything is packed

A method may name several forms, one for each `tier` of its plan (see `Plan.tier`); None stands for full precision.
One that names `pairs` instead has layers held two by two (`PairCodec`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fewer.ragged import Block, Bounds, Counts, Part, Ragged, bounds_of, extent
from fewer.types import Phase

POSITION_BYTES = 4
"""Each kept token knows its position, as an int32."""
UNPACKED_TOKENS = 1 << 14
"""Most tokens unpacked at once (4 MB of keys of 64 float32): a CPU's cache holds them, and long heads take no more."""


@runtime_checkable
class Codec(Protocol):
    """One form of storage."""

    @property
    def block(self) -> int:
        """Tokens of a head that are packed together; those that do not fill a block wait in full precision."""
        ...

    def check(self, d: int, e: int) -> None:
        """Raise `FewerError` where keys of d and values of e features cannot be held in this form."""
        ...

    def encode(self, tokens: Ragged, phase: Phase, signals: Mapping[type, Any]) -> Part:
        """Pack; every head's count is a multiple of `block`, and may be 0."""
        ...

    def bytes_for(self, tokens: int, d: int, e: int, itemsize: int) -> int:
        """Bytes of one head's `tokens` keys of d and values of e features, without positions."""
        ...


Stores = tuple[Codec | None, ...]


def held_bytes(store: Codec | None, tokens: int, d: int, e: int, itemsize: int) -> int:
    """Bytes of one head's tokens in one form, without positions; those that do not fill a block wait in full
    precision."""
    entry = (d + e) * itemsize
    if store is None:
        return tokens * entry
    whole = tokens // store.block * store.block
    return store.bytes_for(whole, d, e, itemsize) + (tokens - whole) * entry


@runtime_checkable
class PairCodec(Protocol):
    """One form of storage for two layers at once, which hold the same tokens."""

    def couples(self, layers: int) -> Sequence[tuple[int, int]]:
        """Which of so many layers go together, each with one above it, and none twice."""
        ...

    def encode_pair(self, lower: Ragged, upper: Ragged) -> tuple[Part, Part]:
        """What each of the two layers attends to from now on. Both count half of the bytes that they share."""
        ...


C = TypeVar("C", bound="Coded")


def books_of(tokens: Ragged) -> "tuple[Counts, Tensor, Tensor | None, Tensor | None, torch.dtype]":
    """The fields of `Coded` for tokens that are about to be packed."""
    return tokens.counts, tokens.positions, tokens.placed, tokens.mass, tokens.keys.dtype


@dataclass(frozen=True)
class Coded:
    """Base of packed parts: the books, and attention by unpacking just the heads that are asked for.

    A subclass adds its packed tensors, `keys`, `values`, `spans` and `payload`; it may override `logits` and `mix`
    where it can multiply without unpacking.
    """

    counts: Counts
    positions: Tensor  # (total,) int32
    placed: Tensor | None
    mass: Tensor | None
    dtype: torch.dtype  # of what comes out

    @property
    def cut(self) -> int:
        """Tokens at whose multiples a head may be cut for unpacking; 0 where only whole heads can be unpacked."""
        return 0

    def keys(self, start: int, end: int) -> Tensor:
        """Keys `(end - start, d)` of these entries; both bounds lie between heads, or where a head may be cut."""
        raise NotImplementedError

    def values(self, start: int, end: int) -> Tensor:
        """Their values `(end - start, e)`."""
        raise NotImplementedError

    def spans(self: C, spans: Sequence[tuple[int, int]], counts: Counts) -> C:
        """A part of these entries only, in this order, that hold `counts`; `books` gives the first four fields."""
        raise NotImplementedError

    def stack(self: C, other: C) -> C | None:
        """The rows of both as one batch; None where two of its kind cannot become one. `stacked` gives the first four
        fields."""
        return None

    def join(self: C, other: C) -> C | None:
        """One part in which each head holds its entries here and then those of `other`. Nothing is packed anew."""
        both, rows = self.stack(other), len(self.counts)
        if both is None:
            return None
        spans = [
            both.bounds[at][head]
            for row in range(rows)
            for head in range(len(self.counts[0]))
            for at in (row, row + rows)
        ]
        counts = tuple(
            tuple(a + b for a, b in zip(one, two, strict=True))
            for one, two in zip(self.counts, other.counts, strict=True)
        )
        return both.spans(spans, counts)

    @property
    def payload(self) -> tuple[int, int]:
        """Bytes of packed numbers, and of scales, indices and whatever else it takes to unpack them."""
        raise NotImplementedError

    def books(
        self, spans: Sequence[tuple[int, int]], counts: Counts
    ) -> tuple[Counts, Tensor, Tensor | None, Tensor | None]:
        """The first four fields for these entries."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([x[start:end] for start, end in spans])

        positions = of(self.positions)
        assert positions is not None
        return counts, positions, of(self.placed), of(self.mass)

    def stacked(self: C, other: C) -> tuple[Counts, Tensor, Tensor | None, Tensor | None]:
        """The first four fields for the rows of both."""
        placed = mass = None
        if self.placed is not None or other.placed is not None:
            placed = torch.cat([x.positions if x.placed is None else x.placed for x in (self, other)])
        if self.mass is not None or other.mass is not None:
            mass = torch.cat(
                [torch.ones_like(x.positions).float() if x.mass is None else x.mass for x in (self, other)]
            )
        return (*self.counts, *other.counts), torch.cat([self.positions, other.positions]), placed, mass

    def logits(self, query: Tensor, at: Block) -> Tensor:
        start, end, *lead = extent(self, at)
        rows = query.reshape(math.prod(lead), *query.shape[-2:])  # (heads, m, d)
        out = rows.new_empty(*rows.shape[:2], (end - start) // len(rows))
        for some, tokens, first, last in self._pieces(start, *out.shape[::2]):
            keys = self.keys(first, last).view(some.stop - some.start, -1, query.shape[-1])
            out[some, :, tokens] = rows[some] @ keys.transpose(-1, -2)
        return out.view(*lead, *out.shape[1:])

    def mix(self, weights: Tensor, at: Block) -> Tensor:
        start, _, *lead = extent(self, at)
        rows = weights.reshape(math.prod(lead), *weights.shape[-2:])  # (heads, m, k)
        out: list[Tensor] = []
        for some, tokens, first, last in self._pieces(start, *rows.shape[::2]):
            values = self.values(first, last)
            mixed = rows[some, :, tokens] @ values.view(some.stop - some.start, -1, values.shape[-1])
            if tokens.start:
                out[-1] = out[-1] + mixed
            else:
                out.append(mixed)
        return torch.cat(out).view(*lead, *out[0].shape[1:])

    def _pieces(self, start: int, heads: int, count: int) -> Iterator[tuple[slice, slice, int, int]]:
        """What is unpacked at once, of so many heads of `count` tokens: which heads, which of their tokens, and their
        first and one-past-last entry."""
        if count > UNPACKED_TOKENS and self.cut:
            step = max(UNPACKED_TOKENS // self.cut, 1) * self.cut
            for head in range(heads):
                for first in range(0, count, step):
                    last, at = min(first + step, count), start + head * count
                    yield slice(head, head + 1), slice(first, last), at + first, at + last
        else:
            step = max(UNPACKED_TOKENS // max(count, 1), 1)
            for head in range(0, heads, step):
                last = min(head + step, heads)
                yield slice(head, last), slice(0, count), start + head * count, start + last * count

    def bias(self, at: Block) -> Tensor | None:
        start, end, *lead = extent(self, at)
        return None if self.mass is None else self.mass[start:end].log().view(*lead, 1, -1)

    @cached_property
    def bounds(self) -> Bounds:
        """First and one-past-last entry of each row and head."""
        return bounds_of(self.counts)

    def read(self) -> Ragged:
        total = len(self.positions)
        return Ragged(self.keys(0, total), self.values(0, total), self.positions, self.counts, self.placed, self.mass)

    def rows(self: C, index: Sequence[int]) -> C:
        spans = [(self.bounds[row][0][0], self.bounds[row][-1][1]) for row in index]
        return self.spans(spans, tuple(self.counts[row] for row in index))

    @property
    def metadata(self) -> int:
        return sum(x.nbytes for x in (self.positions, self.placed, self.mass) if x is not None) + self.payload[1]

    @property
    def nbytes(self) -> int:
        return self.metadata + self.payload[0]


def joined(parts: Sequence[Part], new: Part) -> Part | None:
    """The last of these parts with the new one's entries behind its own, head by head; None where they stay apart."""
    last = parts[-1] if parts else None
    return last.join(new) if isinstance(last, Coded) and type(last) is type(new) else None


def unpacked(part: Part, at: Block) -> int:
    """Most entries that attention unpacks at once for this block."""
    start, end, *lead = extent(part, at)
    if not isinstance(part, Coded):
        return end - start
    heads = math.prod(lead)
    return max(last - first for _, _, first, last in part._pieces(0, heads, (end - start) // heads))
