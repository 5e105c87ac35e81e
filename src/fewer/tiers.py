"""Storage for a tier: any number of tokens of each head, quantised together, with numbers of its own for each channel.

    by channel   x_ij = zero_j + scale_j * code_ij                 extremes of channel j over the head's tokens
    by token     x_ij = c_j * (zero_i + scale_i * code_ij)         channels evened out by c_j, extremes of token i

What one call packs of one head is a run. Runs may be of any length, so scales of channels are held run by run; a head
without tokens has none, and one that was added to has several. Codes are packed along the channels; all other numbers
are float16.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fewer.bits import Packed, check_bits, dequantise, pack, packed_bytes, quantise, unpack
from fewer.codec import Coded, books_of
from fewer.ragged import Counts, Ragged
from fewer.types import Phase


@dataclass(frozen=True)
class Runs:
    """Where each run ends."""

    ends: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Runs":
        return cls(tuple(accumulate(lengths)))

    def between(self, start: int, end: int) -> tuple[slice, list[int]]:
        """The runs that these entries belong to, and how many of them to each."""
        first, last = bisect_right(self.ends, start), bisect_left(self.ends, end) + (start < end)
        bounds = [start, *self.ends[first : last - 1], end]
        return slice(first, max(first, last)), [b - a for a, b in pairwise(bounds)] if start < end else []

    def stack(self, other: "Runs") -> "Runs":
        return Runs((*self.ends, *((self.ends[-1] if self.ends else 0) + end for end in other.ends)))

    def take(self, spans: Sequence[tuple[int, int]]) -> "tuple[list[int], Runs]":
        """The runs of these spans, and where they end when the spans follow each other."""
        found = [self.between(start, end) for start, end in spans]
        at = [run for runs, _ in found for run in range(runs.start, runs.stop)]
        return at, Runs.of([length for _, lengths in found for length in lengths])


def run_lengths(counts: Counts) -> list[int]:
    """The runs of heads that hold so many."""
    return [count for row in counts for count in row if count]


def largest(x: Float[Tensor, "n d"], lengths: Sequence[int]) -> Float[Tensor, "runs d"]:
    """The largest size of each channel in each run, in float32."""
    return torch.stack([part.abs().amax(0) for part in torch.split(x.float(), list(lengths))])


def _tiles(x: Tensor, lengths: list[int]) -> Tensor:
    """Entries `(n, d)` as `(runs, length, d)` where all runs are as long."""
    return x.view(len(lengths), -1, x.shape[-1]) if len(set(lengths)) == 1 else x


def _spread(x: Tensor, lengths: list[int]) -> Tensor:
    """Numbers of runs `(runs, d)`, so that they go with `_tiles`."""
    if len(set(lengths)) == 1:
        return x.unsqueeze(1)
    return x.repeat_interleave(torch.tensor(lengths, dtype=torch.long, device=x.device), 0)


@dataclass(frozen=True)
class ByChannel:
    """A matrix `(n, d)` with a scale and a zero for each channel of each run."""

    codes: UInt8[Tensor, "n bytes"]
    scale: Float[Tensor, "runs d"]
    zero: Float[Tensor, "runs d"]
    runs: Runs
    bits: int

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], bits: int, lengths: Sequence[int]) -> "ByChannel":
        parts = [quantise(part, bits, 0) for part in torch.split(x, list(lengths))]
        codes, scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return cls(pack(codes, bits), scale, zero, Runs.of(lengths), bits)

    def tensor(self, start: int, end: int, dtype: torch.dtype) -> Float[Tensor, "m d"]:
        (at, lengths), d = self.runs.between(start, end), self.scale.shape[-1]
        codes = _tiles(unpack(self.codes[start:end], self.bits, d), lengths)
        return dequantise(codes, _spread(self.scale[at], lengths), _spread(self.zero[at], lengths), dtype).view(-1, d)

    def take(self, spans: Sequence[tuple[int, int]]) -> "ByChannel":
        at, runs = self.runs.take(spans)
        codes = torch.cat([self.codes[start:end] for start, end in spans])
        return ByChannel(codes, self.scale[at], self.zero[at], runs, self.bits)

    def stack(self, other: "ByChannel | ByToken") -> "ByChannel | None":
        """Its entries and then the other's, where both are of one form."""
        if not isinstance(other, ByChannel) or (self.bits, self.scale.shape[1]) != (other.bits, other.scale.shape[1]):
            return None
        codes, scale, zero = (
            torch.cat(x) for x in ((self.codes, other.codes), (self.scale, other.scale), (self.zero, other.zero))
        )
        return ByChannel(codes, scale, zero, self.runs.stack(other.runs), self.bits)

    @property
    def payload(self) -> tuple[int, int]:
        return self.codes.nbytes, self.scale.nbytes + self.zero.nbytes


@dataclass(frozen=True)
class ByToken:
    """A matrix `(n, d)` with a scale and a zero for each token, and a number for each channel of each run, if any."""

    packed: Packed
    channel: Float[Tensor, "runs d"] | None
    runs: Runs

    @classmethod
    def of(
        cls, x: Float[Tensor, "n d"], bits: int, lengths: Sequence[int], channel: Float[Tensor, "runs d"] | None = None
    ) -> "ByToken":
        """Divide each channel of a run by its number in `channel`, where that is one to divide by, and quantise."""
        if channel is not None:
            channel = channel.half()
            channel = torch.where((channel > 0) & channel.isfinite(), channel, 1.0)
            x = (_tiles(x.float(), list(lengths)) / _spread(channel, list(lengths))).view(x.shape)
        return cls(Packed.of(x, bits, channels=x.shape[-1]), channel, Runs.of(lengths))

    def tensor(self, start: int, end: int, dtype: torch.dtype) -> Float[Tensor, "m d"]:
        if self.channel is None:
            return self.packed[start:end].tensor(dtype)
        (at, lengths), x = self.runs.between(start, end), self.packed[start:end].tensor()
        out: Tensor = _tiles(x, lengths) * _spread(self.channel[at], lengths)
        return out.view(x.shape).to(dtype)

    def take(self, spans: Sequence[tuple[int, int]]) -> "ByToken":
        at, runs = self.runs.take(spans)
        packed = Packed.join([self.packed[start:end] for start, end in spans])
        return ByToken(packed, None if self.channel is None else self.channel[at], runs)

    def stack(self, other: "ByChannel | ByToken") -> "ByToken | None":
        """Its entries and then the other's, where both are of one form."""
        if not isinstance(other, ByToken) or not self.packed.fits(other.packed):
            return None
        packed, runs = Packed.join([self.packed, other.packed]), self.runs.stack(other.runs)
        if self.channel is None or other.channel is None:
            return ByToken(packed, None, runs) if self.channel is other.channel else None
        return ByToken(packed, torch.cat([self.channel, other.channel]), runs)

    @property
    def payload(self) -> tuple[int, int]:
        channel = 0 if self.channel is None else self.channel.nbytes
        return self.packed.codes.nbytes, self.packed.metadata + channel


@dataclass(frozen=True)
class TierPart(Coded):
    """Keys and values of one tier."""

    held_keys: ByChannel | ByToken
    held_values: ByToken

    @property
    def cut(self) -> int:
        return 1

    @classmethod
    def of(cls, tokens: Ragged, held_keys: ByChannel | ByToken, held_values: ByToken) -> "TierPart":
        return cls(*books_of(tokens), held_keys, held_values)

    def keys(self, start: int, end: int) -> Tensor:
        return self.held_keys.tensor(start, end, self.dtype)

    def values(self, start: int, end: int) -> Tensor:
        return self.held_values.tensor(start, end, self.dtype)

    def spans(self, spans: Sequence[tuple[int, int]], counts: Counts) -> "TierPart":
        held = self.held_keys.take(spans), self.held_values.take(spans)
        return TierPart(*self.books(spans, counts), self.dtype, *held)

    def stack(self, other: "TierPart") -> "TierPart | None":
        keys, values = self.held_keys.stack(other.held_keys), self.held_values.stack(other.held_values)
        if keys is None or values is None or self.dtype != other.dtype:
            return None
        return TierPart(*self.stacked(other), self.dtype, keys, values)

    @property
    def payload(self) -> tuple[int, int]:
        numbers, others = zip(self.held_keys.payload, self.held_values.payload, strict=True)
        return sum(numbers), sum(others)


@dataclass(frozen=True)
class ChannelSeparable:
    """Keys by channel; values by token, after each channel was divided by c_j = sqrt(max |v_j|) (arXiv 2405.14256).

    Both go over the tokens of a head that one call packs. Of 2, 3, 4 or 8 `bits`; 3 need features in multiples of 8.
    """

    bits: int

    block: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def check(self, d: int, e: int) -> None:
        packed_bytes(d, self.bits), packed_bytes(e, self.bits)

    def encode(self, tokens: Ragged, phase: Phase, signals: Mapping[type, Any]) -> TierPart:
        lengths = run_lengths(tokens.counts)
        values = ByToken.of(tokens.values, self.bits, lengths, largest(tokens.values, lengths).sqrt())
        return TierPart.of(tokens, ByChannel.of(tokens.keys, self.bits, lengths), values)

    def bytes_for(self, tokens: int, d: int, e: int, itemsize: int) -> int:
        keys = tokens * packed_bytes(d, self.bits) + (4 * d if tokens else 0)
        return keys + Packed.bytes_for(tokens, e, self.bits, channels=e) + (2 * e if tokens else 0)
