"""Fewer bits instead of fewer tokens: what every form of packed storage must do, and what the packed parts share.

    encode(tokens, phase, signals)  ->  a Part that attention reads; what was packed is never packed again
    bytes_for(tokens, d, e, size)   ->  its exact bytes, all metadata included, before anything is packed

A method may name several forms, one for each `tier` of its plan (see `Plan.tier`); None stands for full precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fewer.ragged import Counts, Heads, Part, Ragged
from fewer.types import Phase

POSITION_BYTES = 4
"""Each kept token knows its position, as an int32."""


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

C = TypeVar("C", bound="Coded")


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

    def keys(self, start: int, end: int) -> Tensor:
        """Keys `(end - start, d)` of these entries; both bounds lie between heads."""
        raise NotImplementedError

    def values(self, start: int, end: int) -> Tensor:
        """Their values `(end - start, e)`."""
        raise NotImplementedError

    def spans(self: C, spans: Sequence[tuple[int, int]], counts: Counts) -> C:
        """A part of these entries only, in this order, that hold `counts`; `books` gives the first four fields."""
        raise NotImplementedError

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

    def logits(self, query: Tensor, row: int | None, heads: Heads) -> Tensor:
        start, end, lead = self._extent(row, heads)
        keys = self.keys(start, end)
        return query @ keys.view(*lead, -1, keys.shape[-1]).transpose(-1, -2)

    def mix(self, weights: Tensor, row: int | None, heads: Heads) -> Tensor:
        start, end, lead = self._extent(row, heads)
        values = self.values(start, end)
        return weights @ values.view(*lead, -1, values.shape[-1])

    def bias(self, row: int | None, heads: Heads) -> Tensor | None:
        if self.mass is None:
            return None
        start, end, lead = self._extent(row, heads)
        return self.mass[start:end].log().view(*lead, 1, -1)

    def _extent(self, row: int | None, heads: Heads) -> tuple[int, int, tuple[int, ...]]:
        """First and one-past-last entry, and the leading axes of the rectangle between them."""
        if row is None:
            return 0, len(self.positions), (len(self.counts), len(self.counts[0]))
        bounds = self.bounds[row][heads]
        return bounds[0][0], bounds[-1][1], (len(bounds),)

    @cached_property
    def bounds(self) -> list[list[tuple[int, int]]]:
        """First and one-past-last entry of each row and head."""
        end, out = 0, []
        for row in self.counts:
            spans = []
            for count in row:
                spans.append((end, end + count))
                end += count
            out.append(spans)
        return out

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
