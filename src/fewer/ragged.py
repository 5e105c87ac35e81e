"""How kept tokens are held: heads of different lengths, packed flat, nothing padded, nothing masked.

Dense      tokens as a rectangle, for the stages
Part       what attention reads: the tokens of every row and head, in whatever form (see `codec.py` for others)
Ragged     the plain Part, in full precision
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """The same tokens as a rectangle, for the stages: shorter heads are padded at the front.

    `placed` is the position that a key is rotated to; `mass` is how many tokens each counts as, None for one each;
    `aim` is the position that a key is still to be rotated to when it is read, None where all are there.
    """

    keys: Float[Tensor, "b h k d"]
    values: Float[Tensor, "b h k e"]
    positions: Int[Tensor, "b h k"]
    placed: Int[Tensor, "b h k"]
    padding: Bool[Tensor, "b h k"]
    mass: Float[Tensor, "b h k"] | None = None
    aim: Int[Tensor, "b h k"] | None = None

    def take(self, columns: Int[Tensor, "b h k"]) -> "Dense":
        """These columns of each head; -1 gives padding."""
        at = columns.clamp(min=0)
        wide = at.unsqueeze(-1)
        return Dense(
            self.keys.gather(2, wide.expand(-1, -1, -1, self.keys.shape[-1])),
            self.values.gather(2, wide.expand(-1, -1, -1, self.values.shape[-1])),
            self.positions.gather(2, at),
            self.placed.gather(2, at),
            self.padding.gather(2, at) | (columns < 0),
            None if self.mass is None else self.mass.gather(2, at),
            None if self.aim is None else self.aim.gather(2, at),
        )

    @staticmethod
    def join(parts: "Sequence[Dense]") -> "Dense":
        """Side by side, in this order."""
        if len(parts) == 1:
            return parts[0]
        weighed, aimed = (any(getattr(part, name) is not None for part in parts) for name in ("mass", "aim"))
        return Dense(
            torch.cat([part.keys for part in parts], 2),
            torch.cat([part.values for part in parts], 2),
            torch.cat([part.positions for part in parts], 2),
            torch.cat([part.placed for part in parts], 2),
            torch.cat([part.padding for part in parts], 2),
            torch.cat([part.weights() for part in parts], 2) if weighed else None,
            torch.cat([part.placed if part.aim is None else part.aim for part in parts], 2) if aimed else None,
        )

    def weights(self) -> Float[Tensor, "b h k"]:
        """Masses, spelled out."""
        return torch.ones(self.positions.shape, device=self.keys.device) if self.mass is None else self.mass


Block = tuple[slice, slice]
"""Some rows, and some heads of them: all heads if there is more than one row, so that their tokens are neighbours."""
Counts = tuple[tuple[int, ...], ...]
Bounds = list[list[tuple[int, int]]]


@runtime_checkable
class Part(Protocol):
    """Tokens of every row and head, immutable. The heads of a block that is asked for all hold as many tokens."""

    @property
    def counts(self) -> Counts: ...

    @property
    def bounds(self) -> Bounds: ...

    def logits(self, query: Float[Tensor, "r h m d"], at: Block) -> Float[Tensor, "r h m k"]:
        """Products of queries with the keys."""
        ...

    def mix(self, weights: Float[Tensor, "r h m k"], at: Block) -> Float[Tensor, "r h m e"]:
        """The values in these proportions."""
        ...

    def bias(self, at: Block) -> Float[Tensor, "r h 1 k"] | None:
        """What is added to the logits: the log of each token's mass."""
        ...

    def read(self) -> "Ragged":
        """The same in full precision; in the order in which the part holds them."""
        ...

    def rows(self, index: Sequence[int]) -> "Part": ...

    @property
    def nbytes(self) -> int: ...

    @property
    def metadata(self) -> int: ...


def bounds_of(counts: Counts) -> Bounds:
    """First and one-past-last entry of each row and head, one after the other."""
    end, out = 0, []
    for row in counts:
        spans = []
        for count in row:
            spans.append((end, end + count))
            end += count
        out.append(spans)
    return out


def runs(parts: Sequence[Part]) -> list[Block]:
    """Neighbouring rows, or heads of a row, that hold the same numbers in every part: each is one product."""
    out, row = [], 0
    held = [tuple(zip(*counts, strict=True)) for counts in zip(*(part.counts for part in parts), strict=True)]
    for heads, group in groupby(held):  # of a row, each head's numbers
        rows = len(list(group))
        if len(set(heads)) == 1:
            out.append((slice(row, row + rows), slice(0, len(heads))))
        else:
            ends = [end for end in range(1, len(heads) + 1) if end == len(heads) or heads[end] != heads[end - 1]]
            out += [
                (slice(one, one + 1), slice(first, last))
                for one in range(row, row + rows)
                for first, last in pairwise([0, *ends])
            ]
        row += rows
    return out


def extent(part: Part, at: Block) -> tuple[int, int, int, int]:
    """First and one-past-last entry of a block, its rows and its heads."""
    bounds = [spans[at[1]] for spans in part.bounds[at[0]]]
    return bounds[0][0][0], bounds[-1][-1][1], len(bounds), len(bounds[0])


@dataclass(frozen=True)
class Ragged:
    """Keys and values of every row and head, one after the other.

    `counts[row][head]` entries belong to that head. `positions` count a row's real tokens from 0. `placed` is the
    position a key is rotated to, and None where that is its own; `mass` is None where every token counts as one. Where
    keys are held at their `source`, they are rotated to their own positions, and to `placed` whenever they are read.
    """

    keys: Float[Tensor, "total d"]
    values: Float[Tensor, "total e"]
    positions: Int[Tensor, " total"]
    counts: Counts
    placed: Int[Tensor, " total"] | None = None
    mass: Float[Tensor, " total"] | None = None
    source: bool = False

    @classmethod
    def pack(cls, dense: Dense, *, moved: bool) -> "Ragged":
        """Copy the real entries out of a rectangle, so that the rectangle can be freed; `moved` remembers `placed`."""
        there, placed = ~dense.padding, dense.placed if dense.aim is None else dense.aim
        return cls(
            dense.keys[there],
            dense.values[there],
            dense.positions[there].to(torch.int32),
            tuple(tuple(row) for row in there.sum(-1).tolist()),
            placed[there].to(torch.int32) if moved else None,
            None if dense.mass is None else dense.mass[there],
            source=dense.aim is not None,
        )

    def logits(self, query: Tensor, at: Block) -> Tensor:
        return query @ self._block(self.keys, at).transpose(-1, -2)

    def mix(self, weights: Tensor, at: Block) -> Tensor:
        return weights @ self._block(self.values, at)

    def bias(self, at: Block) -> Tensor | None:
        return None if self.mass is None else self._block(self.mass.unsqueeze(-1), at).log().transpose(-1, -2)

    def read(self) -> "Ragged":
        return self

    def _block(self, x: Tensor, at: Block) -> Tensor:
        """The block's entries of `x` `(total, f)`, as a rectangle: a view."""
        start, end, rows, heads = extent(self, at)
        return x[start:end].view(rows, heads, -1, x.shape[-1])

    def cut(self, block: int) -> "tuple[Ragged, Ragged]":
        """Each head's first tokens, as many as whole blocks hold, and the rest."""
        dense = self.dense()
        counts = torch.tensor(self.counts, device=self.keys.device).unsqueeze(-1)  # (b, h, 1)
        rank = torch.arange(dense.padding.shape[-1], device=counts.device) - (dense.padding.shape[-1] - counts)
        first = rank < counts // block * block
        moved = self.placed is not None
        whole, rest = (replace(dense, padding=dense.padding | other) for other in (~first, first))
        return Ragged.pack(whole, moved=moved), Ragged.pack(rest, moved=moved)

    @cached_property
    def bounds(self) -> Bounds:
        """First and one-past-last entry of each row and head."""
        return bounds_of(self.counts)

    @cached_property
    def even(self) -> int | None:
        """The count of every head if they are all equal: the storage then is a rectangle already."""
        counts = {count for row in self.counts for count in row}
        return counts.pop() if len(counts) == 1 else None

    def dense(self) -> Dense:
        """As a rectangle, padded at the front. A view where the heads are even, else a copy."""
        b, h = len(self.counts), len(self.counts[0])
        aim = self.placed if self.source else None
        placed = self.positions if self.placed is None or self.source else self.placed
        if self.even is not None:
            k = self.even
            return Dense(
                self.keys.view(b, h, k, self.keys.shape[-1]),
                self.values.view(b, h, k, self.values.shape[-1]),
                self.positions.view(b, h, k).long(),
                placed.view(b, h, k).long(),
                torch.zeros(b, h, k, dtype=torch.bool, device=self.keys.device),
                None if self.mass is None else self.mass.view(b, h, k),
                None if aim is None else aim.view(b, h, k).long(),
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
            None if self.mass is None else self.mass[index].masked_fill(padding, 1),
            None if aim is None else aim[index].long().masked_fill(padding, -1),
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
            None if self.mass is None else torch.cat([self.mass[start:end] for start, end in spans]),
            self.source,
        )

    @staticmethod
    def stack(parts: Sequence["Ragged"]) -> "Ragged":
        """One batch of all the rows."""
        moved, weighed = (any(getattr(p, name) is not None for p in parts) for name in ("placed", "mass"))
        ones = [torch.ones(len(p.keys), device=p.keys.device) if p.mass is None else p.mass for p in parts]
        return Ragged(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.positions for part in parts]),
            tuple(row for part in parts for row in part.counts),
            torch.cat([part.positions if part.placed is None else part.placed for part in parts]) if moved else None,
            torch.cat(ones) if weighed else None,
        )

    @property
    def metadata(self) -> int:
        """Bytes that are neither keys nor values."""
        return self.positions.nbytes + sum(x.nbytes for x in (self.placed, self.mass) if x is not None)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.metadata
