"""Two layers held as one: a direction for both, each layer's lengths, and some tokens whole.

Merged   the keys of two layers, or their values          Pair   both, and the positions: one object for two layers
Half     the Part that one of the layers attends to
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.codec import Coded
from fewer.ragged import Counts


@dataclass(frozen=True)
class Merged:
    """The keys, or the values, of two layers. Entries `at` stay whole; of the others m there is one direction each."""

    direction: Float[Tensor, "m d"]
    lengths: Float[Tensor, "2 m"]
    whole: Float[Tensor, "2 r d"]
    at: Int[Tensor, " r"]

    def read(self, upper: int, start: int, end: int) -> Float[Tensor, "n d"]:
        """These entries as the lower (0) or the upper layer (1) has them."""
        first, last = self.within(start, end)
        own = torch.zeros(end - start, dtype=torch.bool, device=self.at.device)
        own[self.at[first:last].long() - start] = True
        out = self.direction.new_empty(end - start, self.direction.shape[-1])
        mixed = slice(start - first, end - last)
        out[~own] = self.direction[mixed] * self.lengths[upper, mixed].unsqueeze(-1)
        out[own] = self.whole[upper, first:last]
        return out

    def spans(self, spans: Sequence[tuple[int, int]]) -> "Merged":
        """These entries only, in this order."""
        inside, before = [self.within(*span) for span in spans], 0
        mixed = [slice(s - first, e - last) for (s, e), (first, last) in zip(spans, inside, strict=True)]
        at = []
        for (start, end), (first, last) in zip(spans, inside, strict=True):
            at.append(self.at[first:last] + (before - start))
            before += end - start
        return Merged(
            torch.cat([self.direction[x] for x in mixed]),
            torch.cat([self.lengths[:, x] for x in mixed], 1),
            torch.cat([self.whole[:, first:last] for first, last in inside], 1),
            torch.cat(at),
        )

    def within(self, start: int, end: int) -> tuple[int, int]:
        """Which of the entries that stay whole lie between."""
        first, last = torch.searchsorted(self.at, torch.tensor([start, end], device=self.at.device)).tolist()
        return first, last


@dataclass(frozen=True)
class Pair:
    """What two layers hold together."""

    positions: Int[Tensor, " total"]
    keys: Merged
    values: Merged

    @cached_property
    def made(self) -> "WeakValueDictionary[Any, Pair]":
        """Selections of it that are in use: both layers ask for the same rows, and have to get the same object."""
        return WeakValueDictionary()

    def spans(self, spans: tuple[tuple[int, int], ...]) -> "Pair":
        found = self.made.get(spans)
        if found is None:
            positions = torch.cat([self.positions[start:end] for start, end in spans])
            found = self.made[spans] = Pair(positions, self.keys.spans(spans), self.values.spans(spans))
        return found


@dataclass(frozen=True)
class Half(Coded):
    """One layer's side of a pair. Of all bytes, which are shared, it counts half."""

    pair: Pair
    upper: int  # 0 or 1

    cut: ClassVar[int] = 1

    def keys(self, start: int, end: int) -> Tensor:
        return self.pair.keys.read(self.upper, start, end)

    def values(self, start: int, end: int) -> Tensor:
        return self.pair.values.read(self.upper, start, end)

    def spans(self, spans: Sequence[tuple[int, int]], counts: Counts) -> "Half":
        pair = self.pair.spans(tuple(spans))
        return replace(self, counts=counts, positions=pair.positions, pair=pair)

    @property
    def payload(self) -> tuple[int, int]:
        both = (self.pair.keys, self.pair.values)
        data = sum(x.direction.nbytes + x.whole.nbytes for x in both)
        rest = sum(x.lengths.nbytes + x.at.nbytes for x in both)
        return (data + self.upper) // 2, (rest + self.upper) // 2

    @property
    def metadata(self) -> int:
        return (self.positions.nbytes + self.upper) // 2 + self.payload[1]
