"""Storage for heads that keep different numbers of tokens: packed flat, nothing padded, nothing masked."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """The same tokens as a rectangle, for the stages: shorter heads are padded at the front."""

    keys: Float[Tensor, "b h k d"]
    values: Float[Tensor, "b h k e"]
    positions: Int[Tensor, "b h k"]
    placed: Int[Tensor, "b h k"]
    padding: Bool[Tensor, "b h k"]


@dataclass(frozen=True)
class Ragged:
    """Keys and values of every row and head, one after the other.

    `counts[row][head]` entries belong to that head. `positions` count a row's real tokens from 0. `placed` is the
    position a key is rotated to, and None where that is its own.
    """

    keys: Float[Tensor, "total d"]
    values: Float[Tensor, "total e"]
    positions: Int[Tensor, " total"]
    counts: tuple[tuple[int, ...], ...]
    placed: Int[Tensor, " total"] | None = None

    @classmethod
    def pack(cls, dense: Dense, *, moved: bool) -> "Ragged":
        """Copy the real entries out of a rectangle, so that the rectangle can be freed; `moved` remembers `placed`."""
        there = ~dense.padding
        return cls(
            dense.keys[there],
            dense.values[there],
            dense.positions[there].to(torch.int32),
            tuple(tuple(row) for row in there.sum(-1).tolist()),
            dense.placed[there].to(torch.int32) if moved else None,
        )

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

    @cached_property
    def runs(self) -> list[tuple[int, slice, slice]]:
        """Row, heads and entries of neighbouring heads of one count: each is a rectangle, and one product."""
        out, end = [], 0
        for row, counts in enumerate(self.counts):
            for count, heads in groupby(range(len(counts)), key=counts.__getitem__):
                found = list(heads)
                start, end = end, end + count * len(found)
                out.append((row, slice(found[0], found[-1] + 1), slice(start, end)))
        return out

    @cached_property
    def even(self) -> int | None:
        """The count of every head if they are all equal: the storage then is a rectangle already."""
        counts = {count for row in self.counts for count in row}
        return counts.pop() if len(counts) == 1 else None

    def dense(self) -> Dense:
        """As a rectangle, padded at the front. A view where the heads are even, else a copy."""
        b, h = len(self.counts), len(self.counts[0])
        placed = self.positions if self.placed is None else self.placed
        if self.even is not None:
            k = self.even
            return Dense(
                self.keys.view(b, h, k, self.keys.shape[-1]),
                self.values.view(b, h, k, self.values.shape[-1]),
                self.positions.view(b, h, k).long(),
                placed.view(b, h, k).long(),
                torch.zeros(b, h, k, dtype=torch.bool, device=self.keys.device),
            )
        counts = torch.tensor(self.counts, device=self.keys.device).unsqueeze(-1)  # (b, h, 1)
        k = max(max(row) for row in self.counts)
        ends = counts.flatten().cumsum(0).view_as(counts)
        index = ends - k + torch.arange(k, device=self.keys.device)
        padding = index < ends - counts
        index = index.clamp(min=0)
        return Dense(
            self.keys[index].masked_fill(padding.unsqueeze(-1), 0),
            self.values[index].masked_fill(padding.unsqueeze(-1), 0),
            self.positions[index].long().masked_fill(padding, -1),
            placed[index].long().masked_fill(padding, -1),
            padding,
        )

    def rows(self, index: Sequence[int]) -> "Ragged":
        """These rows, in this order; a row may come more than once."""
        spans = [(self.bounds[row][0][0], self.bounds[row][-1][1]) for row in index]
        return Ragged(
            torch.cat([self.keys[start:end] for start, end in spans]),
            torch.cat([self.values[start:end] for start, end in spans]),
            torch.cat([self.positions[start:end] for start, end in spans]),
            tuple(self.counts[row] for row in index),
            None if self.placed is None else torch.cat([self.placed[start:end] for start, end in spans]),
        )

    @staticmethod
    def stack(parts: Sequence["Ragged"]) -> "Ragged":
        """One batch of all the rows."""
        moved = any(part.placed is not None for part in parts)
        return Ragged(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.positions for part in parts]),
            tuple(row for part in parts for row in part.counts),
            torch.cat([part.positions if part.placed is None else part.placed for part in parts]) if moved else None,
        )

    @property
    def metadata(self) -> int:
        """Bytes that are neither keys nor values."""
        return self.positions.nbytes + (0 if self.placed is None else self.placed.nbytes)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.metadata
