"""Numbers in 2, 3, 4 or 8 bits: round to nearest on a grid of its own for each group, packed into exact bytes.

    scale = (max - min) / (2^bits - 1),  zero = min             of a group, both kept in float16
    code  = round((x - zero) / scale)                           against the kept numbers, so that errors do not add up
    x'    = zero + scale * code

In 8 bits a step is so small that rounding zero to float16 may move the grid by several, past the largest or the
smallest numbers of a group that is far from 0: there zero is rounded down, and scale = (max - zero) / 255. In fewer
bits the wider steps would cost more than that gains.

A vector is packed along its last axis, and its parts lie over each other rather than side by side: in 4 bits the first
half fills the low half of each byte and the second half the high one, so unpacking is a shift, a join and a mask.
Tokens are never packed together, so that tokens can be taken out and appended without unpacking anything.

No library is used, because those at hand are made for weights, which never grow: optimum-quanto 0.2 (2 and 4 bits) and
hqq 0.2 (3 bits as ten numbers in an int32) lay rows over each other, so that a row more means packing anew, and
torchao 0.18 has only a prototype that gives a list of pieces for each tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fewer.types import FewerError

BITS = (2, 3, 4, 8)
_MOST = torch.finfo(torch.float16).max


def check_bits(bits: int) -> None:
    """Raise `FewerError` unless numbers can be packed in so many bits."""
    if isinstance(bits, bool) or bits not in BITS:
        raise FewerError(f"bits={bits!r}: numbers are packed in 2, 3, 4 or 8 bits")


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that n numbers take."""
    check_bits(bits)
    if bits == 3 and n % 8:
        raise FewerError(f"{n} numbers in 3 bits do not fill whole bytes: eight of them take three, so pack multiples")
    return -(-n * bits // 8)


def pack(codes: UInt8[Tensor, "*lead n"], bits: int) -> UInt8[Tensor, "*lead bytes"]:
    """Codes below `2**bits`, in `ceil(n * bits / 8)` bytes; in 3 bits n must be a multiple of 8.

    >>> pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist()  # 1 below 3, 2 below 4
    [49, 66]
    """
    size = packed_bytes(codes.shape[-1], bits)
    if bits == 8:
        return codes
    if bits == 3:
        first, second, last, rest = torch.split(codes, [size, size, size // 3, size // 3], -1)
        high = torch.cat([last & 3, last >> 2 | (rest & 1) << 1, rest >> 1], -1)  # six bits, in three parts
        return first | second << 3 | high << 6
    out = torch.zeros(*codes.shape[:-1], size, dtype=torch.uint8, device=codes.device)
    for place, part in enumerate(torch.split(codes, size, -1)) if size else ():
        out[..., : part.shape[-1]] |= part << place * bits
    return out


def unpack(packed: UInt8[Tensor, "*lead bytes"], bits: int, n: int) -> UInt8[Tensor, "*lead n"]:
    """The n codes of each vector again.

    >>> unpack(torch.tensor([49, 66], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    size = packed_bytes(n, bits)
    if packed.shape[-1] != size:
        raise FewerError(f"{n} numbers in {bits} bits are {size} bytes, not {packed.shape[-1]}")
    if bits == 8:
        return packed
    if bits == 3:
        high = packed >> 6
        one, two, three = torch.chunk(high, 3, -1)
        parts = [packed, packed >> 3, one | two << 2, two >> 1 | three << 1]
    else:
        parts = [packed, *(packed >> shift for shift in range(bits, 8, bits))]
    return torch.cat(parts, -1).bitwise_and_(2**bits - 1)[..., :n]


def quantise(
    x: Float[Tensor, "*shape"], bits: int, dim: int | tuple[int, ...]
) -> tuple[UInt8[Tensor, "*shape"], Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Codes, scale and zero of `x`, one group over `dim`; scale and zero keep it with size 1, in float16.

    A constant group that float16 can hold has scale 0. Numbers beyond it (65504) are clipped to what it can.
    """
    check_bits(bits)
    x = x.float()
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = least.clamp(-_MOST, _MOST).half()
    if bits == 8:
        zero = _at_most(zero, least)
        least = zero.float()
    scale = ((most - least) / (2**bits - 1)).clamp(0, _MOST).half()
    step = torch.where(scale == 0, 1.0, scale.float())
    top = ((_MOST - zero.float()) / step).floor().clamp(max=2**bits - 1)  # what comes out must fit float16 as well
    codes = ((x - zero.float()) / step).round_().clamp_(min=0)
    return torch.minimum(codes, top).to(torch.uint8), scale, zero


def _at_most(near: Float[Tensor, "*groups"], x: Float[Tensor, "*groups"]) -> Float[Tensor, "*groups"]:
    """The greatest float16 that is not above x, given the nearest."""
    above = (near.float() > x) & (near > -_MOST)
    size = near.view(torch.int16)  # and sign: neighbours in size are neighbours as integers
    return torch.where(above, torch.where(near > 0, size - 1, size + 1), size).view(torch.float16)


def dequantise(
    codes: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*groups"],
    zero: Float[Tensor, "*groups"],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape"]:
    """`zero + scale * codes`, worked out in float32."""
    return codes.float().mul_(scale.float()).add_(zero.float()).to(dtype)


@dataclass(frozen=True)
class Packed:
    """A matrix of tokens `(n, d)` in few bits. `tokens` neighbouring tokens by `channels` neighbouring channels share a
    scale and a zero, so the matrix can be cut and joined at multiples of `tokens` without packing anything anew."""

    codes: UInt8[Tensor, "n bytes"]
    scale: Float[Tensor, "n_groups d_groups"]
    zero: Float[Tensor, "n_groups d_groups"]
    bits: int
    d: int
    tokens: int
    channels: int

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], bits: int, *, tokens: int = 1, channels: int = 1) -> "Packed":
        """Quantise and pack; `FewerError` where the groups do not divide `x`."""
        n, d = x.shape
        if n % tokens or d % channels:
            raise FewerError(f"groups of {tokens} tokens by {channels} channels do not divide {n} by {d}")
        tiles = x.view(n // tokens, tokens, d // channels, channels)
        codes, scale, zero = quantise(tiles, bits, (1, 3))
        return cls(
            pack(codes.view(n, d), bits), scale[:, 0, :, 0], zero[:, 0, :, 0], bits, d, tokens=tokens, channels=channels
        )

    def __len__(self) -> int:
        return self.codes.shape[0]

    def __getitem__(self, at: slice) -> "Packed":
        """Some tokens, as views."""
        start, end, _ = at.indices(len(self))
        if start % self.tokens or end % self.tokens:
            raise FewerError(f"[{start}:{end}] cuts through groups of {self.tokens} tokens")
        groups = slice(start // self.tokens, end // self.tokens)
        return self._like(self.codes[start:end], self.scale[groups], self.zero[groups])

    def fits(self, other: "Packed") -> bool:
        """Whether both have the same groups."""
        return all(getattr(self, name) == getattr(other, name) for name in ("bits", "d", "tokens", "channels"))

    @staticmethod
    def join(parts: "Sequence[Packed]") -> "Packed":
        """Their tokens one after the other; all parts have the same groups."""
        codes, scale, zero = (
            torch.cat(x) for x in zip(*((p.codes, p.scale, p.zero) for p in parts), strict=True)
        )  # fmt: skip
        return parts[0]._like(codes, scale, zero)

    def _like(self, codes: Tensor, scale: Tensor, zero: Tensor) -> "Packed":
        return Packed(codes, scale, zero, self.bits, self.d, self.tokens, self.channels)

    def unpack(self) -> UInt8[Tensor, "n d"]:
        """The codes."""
        return unpack(self.codes, self.bits, self.d)

    def tensor(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
        """The numbers."""
        tiles = self.unpack().view(-1, self.tokens, self.d // self.channels, self.channels)
        scale, zero = (x[:, None, :, None] for x in (self.scale, self.zero))
        return dequantise(tiles, scale, zero, dtype).view(-1, self.d)

    @property
    def metadata(self) -> int:
        """Bytes of scales and zeros."""
        return self.scale.nbytes + self.zero.nbytes

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.metadata

    @staticmethod
    def bytes_for(n: int, d: int, bits: int, *, tokens: int = 1, channels: int = 1) -> int:
        """What `of` would take for a matrix of that size."""
        return n * packed_bytes(d, bits) + 4 * (n // tokens) * (d // channels)
