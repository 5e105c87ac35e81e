"""Packing into exact bytes, and rounding to a grid, against references that look at one bit or one number at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewer.bits import BITS, Packed, dequantise, pack, packed_bytes, quantise, unpack
from fewer.types import FewerError

HALF = torch.finfo(torch.float16).max
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_codes(*shape: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def lengths(bits: int) -> tuple[int, ...]:
    return (0, 8, 16, 40, 64) if bits == 3 else (0, 1, 2, 3, 5, 8, 16, 40, 63, 64)


# --- packing ---


def naive_bytes(codes: list[int], bits: int) -> list[int]:
    """Bit by bit: which bit of which byte each bit of each code is.

    In 2, 4 and 8 bits, code i of parts as long as the packed vector is in byte i mod size, above the parts before. In 3
    bits the first two parts lie so; the two parts that are left, a third as long, share the high two bits of the bytes:
    bit 0 and 1 of the one in the first third, its bit 2 and the other's bit 0 in the second, the rest in the last.
    """
    n = len(codes)
    size = math.ceil(n * bits / 8)
    out = [0] * size
    for i, code in enumerate(codes):
        for bit in range(bits):
            part, byte, above = i // size, i % size, bit
            if bits == 3 and i >= 2 * size:
                third, within = size // 3, (i - 2 * size) % (size // 3)
                nth = 3 * ((i - 2 * size) // third) + bit  # of the six bits above each other, two for each third
                byte, part, above = nth // 2 * third + within, 2, nth % 2
            out[byte] |= (code >> bit & 1) << part * bits + above
    return out


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_the_reference_bit_for_bit(bits: int) -> None:
    for n in lengths(bits):
        codes = random_codes(n, bits=bits, seed=n)
        packed = pack(codes, bits)
        assert packed.tolist() == naive_bytes(codes.tolist(), bits)
        assert packed.dtype == torch.uint8 and len(packed) == packed_bytes(n, bits) == math.ceil(n * bits / 8)


def test_worked_examples() -> None:
    """4 bits: 1 and 3 * 16 in a byte, 2 and 15 * 16 in the next. 2 bits: 3 + 2 * 4 + 1 * 16 + 0 * 64 = 27.

    3 bits, 0 to 7: 0 + 3 * 8, 1 + 4 * 8, 2 + 5 * 8; then 6 and 7, as bits 0 1 1 and 1 1 1 from the lowest: 0 1, 1 1 and
    1 1 in the high bits, that is 2 * 64, 3 * 64 and 3 * 64.
    """
    assert pack(torch.tensor([1, 2, 3, 15], dtype=torch.uint8), 4).tolist() == [49, 242]
    assert pack(torch.tensor([3, 2, 1, 0], dtype=torch.uint8), 2).tolist() == [27]
    assert pack(torch.arange(8, dtype=torch.uint8), 3).tolist() == [24 + 128, 33 + 192, 42 + 192]
    assert pack(torch.tensor([7, 255], dtype=torch.uint8), 8).tolist() == [7, 255]


@pytest.mark.parametrize("bits", BITS)
def test_unpacking_gives_the_codes_back(bits: int) -> None:
    for n in lengths(bits):
        codes = random_codes(3, 2, n, bits=bits)
        before = codes.clone()
        assert torch.equal(unpack(pack(codes, bits), bits, n), codes)
        assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_unpacks_and_packs_to_itself(bits: int) -> None:
    """No bit is unused where the numbers fill the bytes."""
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(-1, 3)
    assert torch.equal(pack(unpack(packed, bits, 24 // bits), bits), packed)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, -2, True])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(FewerError, match="2, 3, 4 or 8 bits"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(FewerError, match="2, 3, 4 or 8 bits"):
        quantise(torch.zeros(8), bits, -1)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(FewerError, match="7 numbers in 3 bits do not fill whole bytes"):
        pack(torch.zeros(7, dtype=torch.uint8), 3)
    with pytest.raises(FewerError, match="9 numbers in 4 bits are 5 bytes, not 4"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 9)


# --- quantising ---


def naive_quantise(x: list[float], bits: int) -> tuple[list[int], float, float]:
    """One group, one number at a time; scale and zero rounded to float16 before they are used, and in 8 bits zero
    rounded down and the scale from there."""

    def half(value: float) -> float:
        return float(torch.tensor(value).half())

    zero, low = half(min(x)), min(x)
    if bits == 8:
        low = zero = zero if zero <= low else float(np.nextafter(np.float16(zero), np.float16(-np.inf)))
    scale = half((max(x) - low) / (2**bits - 1))
    codes = [0 if scale == 0 else round((value - zero) / scale) for value in x]  # python rounds half to even, as torch
    return [min(max(code, 0), 2**bits - 1) for code in codes], scale, zero


@pytest.mark.parametrize("bits", BITS)
def test_quantising_is_the_reference(bits: int) -> None:
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    for dim, groups in ((1, x.tolist()), (0, x.T.tolist())):
        codes, scale, zero = quantise(x, bits, dim)
        assert codes.dtype == torch.uint8 and scale.dtype == zero.dtype == torch.float16
        assert scale.shape == zero.shape == ((6, 1) if dim else (1, 20))
        for index, group in enumerate(groups):
            expected, step, least = naive_quantise(group, bits)
            assert codes.select(1 - dim, index).tolist() == expected
            assert (float(scale.flatten()[index]), float(zero.flatten()[index])) == (step, least)


def test_a_worked_group() -> None:
    """-1 to 2 in 2 bits: steps of 1 from -1, so 0.4 is 1.4 steps up and goes to 1, which is 0."""
    codes, scale, zero = quantise(torch.tensor([-1.0, 0.4, 2.0, 0.6]), 2, 0)
    assert codes.tolist() == [0, 1, 3, 2] and scale.item() == 1 and zero.item() == -1
    assert dequantise(codes, scale, zero).tolist() == [-1, 0, 2, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_what_comes_out_is_within_half_a_step(bits: int, dtype: torch.dtype) -> None:
    x = (torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    codes, scale, zero = quantise(x, bits, 1)
    back = dequantise(codes, scale, zero)
    slack = scale.float() * (2**bits - 1) * 2**-11 + zero.float().abs() * 2**-10  # of scale and zero in float16
    assert bool(((back - x.float()).abs() <= scale.float() / 2 + slack).all())
    assert dequantise(codes, scale, zero, dtype).dtype == dtype


@pytest.mark.parametrize("mean", [-3000.0, -300.0, -0.1, 0.1, 20.0, 300.0, 3000.0])
def test_in_eight_bits_no_end_of_a_group_is_cut_off(mean: float) -> None:
    """However far from 0: half a step, and what rounding the scale adds over 255 of them. Zero is at or below the least
    and no more than one float16 away."""
    x = mean + torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) * min(abs(mean), 1)
    codes, scale, zero = quantise(x, 8, 1)
    off, least = (dequantise(codes, scale, zero) - x).abs(), x.amin(1, keepdim=True)
    assert bool((off <= scale.float() * (0.5 + 255 * 2**-11) + abs(mean) * 1e-6).all())
    next_up = torch.from_numpy(np.nextafter(zero.numpy(), np.float16(np.inf))).float()
    assert bool((zero.float() <= least).all()) and bool((next_up > least).all())


def test_in_eight_bits_far_from_zero_the_error_is_that_of_near() -> None:
    """A step is a 255th of about 4.2; a uniform error has a root mean square of 0.29 of it."""
    x = 300 + torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    off = dequantise(*quantise(x, 8, 1)) - x
    assert float(off.square().mean().sqrt()) < 0.005


@pytest.mark.parametrize("least", [-6e-8, -1e-9, -0.0, 0.0, 1e-9, -HALF, -1e30, 65000.0])
def test_zero_is_rounded_down_across_zero_and_at_the_ends(least: float) -> None:
    x = torch.tensor([[least, least + 1.0, least + 2.0]])
    codes, scale, zero = quantise(x, 8, 1)
    assert bool(zero.isfinite().all()) and zero.item() <= max(least, -HALF)
    assert bool(dequantise(codes, scale, zero, torch.float16).isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-8, 1e-4, 1.0, 1e4, 6e4, 1e30])
@pytest.mark.parametrize("bits", BITS)
def test_no_number_breaks_it(bits: int, size: float, dtype: torch.dtype) -> None:
    """Subnormal steps, steps of nothing, and numbers that float16 cannot hold; what comes out fits float16."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.rand(20, 16, generator=draw) * 2 * size - size).clamp(*torch.tensor([-1, 1]) * torch.finfo(dtype).max)
    x = x.to(dtype)
    codes, scale, zero = quantise(x, bits, 1)
    back = dequantise(codes, scale, zero, torch.float16)
    assert bool(back.isfinite().all()) and int(codes.max()) < 2**bits
    expected = x.float().clamp(-HALF, HALF)
    step = ((x.float().amax(1) - x.float().amin(1)) / (2**bits - 1)).clamp(max=HALF).unsqueeze(1)
    if size < 6e4:
        assert bool(((back.float() - expected).abs() <= step * 0.52 + size * 2e-3 + 1e-4 * (size < 1e-3)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups_are_what_they_were(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0], [1.5], [-3.25], [HALF], [-HALF]]).to(dtype).expand(-1, 8)
    codes, scale, zero = quantise(x, 2, 1)
    assert not bool(codes.any()) and not bool(scale.any())
    assert torch.equal(dequantise(codes, scale, zero), x.float().clamp(-HALF, HALF))


def test_the_largest_half_range_stays_finite() -> None:
    """From -65504 to 65504: the float16 step is rounded up, and the last code would be past the end."""
    x = torch.tensor([-HALF, 0.0, HALF]).half()
    for bits in BITS:
        assert bool(dequantise(*quantise(x, bits, 0), torch.float16).isfinite().all())


def test_inputs_are_not_written_to() -> None:
    x = torch.randn(4, 8)
    before = x.clone()
    quantise(x, 4, 1)
    assert torch.equal(x, before)


# --- matrices of tokens ---

GROUPS = ((1, 8), (1, 16), (4, 1), (8, 1), (4, 4))


@pytest.mark.parametrize(("tokens", "channels"), GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_is_its_groups(bits: int, tokens: int, channels: int) -> None:
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    packed = Packed.of(x, bits, tokens=tokens, channels=channels)
    for i in range(0, 24, tokens):
        for j in range(0, 16, channels):
            group = x[i : i + tokens, j : j + channels]
            codes, scale, zero = naive_quantise(group.flatten().tolist(), bits)
            assert packed.unpack()[i : i + tokens, j : j + channels].flatten().tolist() == codes
            expected = (zero + scale * torch.tensor(codes)).view_as(group)
            torch.testing.assert_close(packed.tensor()[i : i + tokens, j : j + channels], expected)


@pytest.mark.parametrize(("tokens", "channels"), GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_known_beforehand(bits: int, tokens: int, channels: int) -> None:
    for n in (0, 8, 24):
        packed = Packed.of(torch.randn(n, 16), bits, tokens=tokens, channels=channels)
        held = sum(x.untyped_storage().nbytes() for x in (packed.codes, packed.scale, packed.zero))
        assert Packed.bytes_for(n, 16, bits, tokens=tokens, channels=channels) == packed.nbytes == held
        assert packed.nbytes == n * 16 * bits // 8 + packed.metadata == n * 2 * bits + 4 * n * 16 // tokens // channels
        assert len(packed) == n


@pytest.mark.parametrize(("tokens", "channels"), GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_cutting_and_joining_packs_nothing_anew(bits: int, tokens: int, channels: int) -> None:
    packed = Packed.of(torch.randn(40, 16), bits, tokens=tokens, channels=channels)
    whole, parts = packed.tensor(), [packed[:8], packed[8:32], packed[32:]]
    for part, expected in zip(parts, whole.split([8, 24, 8]), strict=True):
        assert torch.equal(part.tensor(), expected)
    back = Packed.join([parts[1], parts[0], parts[2]])
    assert torch.equal(back.tensor(), torch.cat([whole[8:32], whole[:8], whole[32:]]))
    assert torch.equal(back.codes, torch.cat([packed.codes[8:32], packed.codes[:8], packed.codes[32:]]))


def test_a_slice_is_a_view() -> None:
    packed = Packed.of(torch.randn(40, 16), 4, tokens=4)
    part = packed[8:16]
    for name in ("codes", "scale", "zero"):
        assert getattr(part, name).untyped_storage().data_ptr() == getattr(packed, name).untyped_storage().data_ptr()


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FewerError, match="groups of 32 tokens by 1 channels do not divide 40 by 16"):
        Packed.of(torch.zeros(40, 16), 4, tokens=32)
    with pytest.raises(FewerError, match="groups of 1 tokens by 32 channels do not divide 40 by 16"):
        Packed.of(torch.zeros(40, 16), 4, channels=32)
    with pytest.raises(FewerError, match=r"\[2:8\] cuts through groups of 4 tokens"):
        Packed.of(torch.zeros(40, 16), 4, tokens=4)[2:8]


def test_parts_of_other_groups_do_not_fit() -> None:
    x = torch.randn(16, 16)
    one = Packed.of(x, 4, tokens=4)
    assert one.fits(Packed.of(x[:8], 4, tokens=4))
    for other in (
        Packed.of(x, 2, tokens=4),
        Packed.of(x, 4, tokens=8),
        Packed.of(x, 4, channels=4),
        Packed.of(x[:, :8], 4),
    ):
        assert not one.fits(other)
