"""KIVI: every token stays; keys in few bits by channel, values by token."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewer.bits import BITS, Packed
from fewer.methods import resolve, resolve_store
from fewer.methods.kv.kivi import KIVI
from fewer.ragged import Ragged
from fewer.types import FewerError
from tests.methods.kv.build import decide, kept, place, random_row, same_alone_and_padded


def ragged(keys: Tensor, values: Tensor, counts: Any = None) -> Ragged:
    """One row of one head, or heads of these counts."""
    n = len(keys)
    return Ragged(keys, values, torch.arange(n, dtype=torch.int32), ((n,),) if counts is None else counts)


def encode(method: KIVI, keys: Tensor, values: Tensor, counts: Any = None) -> Any:
    return method.encode(ragged(keys, values, counts), "prefill", {})


def test_worked_example() -> None:
    """Two tokens of two channels, groups of two, 2 bits: three steps from the least to the most.

    Keys by channel: channel 0 holds 0 and 3, steps of 1, codes 0 and 3; channel 1 holds 10 and 7, codes 3 and 0.
    Values by token: token 0 holds 0 and 10, steps of 10/3 (3.334 in float16), codes 0 and 3; token 1 holds 3 and 7,
    steps of 4/3, codes 0 and 3.
    """
    x = torch.tensor([[0.0, 10.0], [3.0, 7.0]])
    part = encode(KIVI(2, group=2, residual=2), x, x)
    assert part.packed_keys.unpack().tolist() == [[0, 3], [3, 0]]
    assert part.packed_keys.zero.tolist() == [[0, 7]] and part.packed_keys.scale.tolist() == [[1, 1]]
    assert torch.equal(part.keys(0, 2), x)
    assert part.packed_values.unpack().tolist() == [[0, 3], [0, 3]]
    assert part.packed_values.zero.tolist() == [[0], [3]]
    assert part.packed_values.scale.tolist() == torch.tensor([[10 / 3], [4 / 3]]).half().tolist()


def naive(x: Tensor, bits: int, group: int, by_token: bool) -> list[list[int]]:
    """Codes, one group after the other."""
    n, d = x.shape
    codes = [[0] * d for _ in range(n)]
    tiles = (
        [[(i, j) for j in range(start, start + group)] for i in range(n) for start in range(0, d, group)]
        if by_token
        else [[(i, j) for i in range(start, start + group)] for j in range(d) for start in range(0, n, group)]
    )
    for tile in tiles:
        found = [float(x[at]) for at in tile]
        low = zero = float(torch.tensor(min(found)).half())
        if bits < 8:
            low = min(found)
        elif zero > min(found):  # in 8 bits zero is rounded down, and the scale goes from there
            low = zero = float(np.nextafter(np.float16(zero), np.float16(-np.inf)))
        scale = float(torch.tensor((max(found) - low) / (2**bits - 1)).half())
        for (i, j), value in zip(tile, found, strict=True):
            codes[i][j] = min(max(round((value - zero) / scale), 0), 2**bits - 1)
    return codes


@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_reference(bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    keys, values = (torch.randn(32, 16, generator=draw) for _ in range(2))
    part = encode(KIVI(bits, group=8, residual=16), keys, values)
    assert part.packed_keys.unpack().tolist() == naive(keys, bits, 8, by_token=False)
    assert part.packed_values.unpack().tolist() == naive(values, bits, 8, by_token=True)


def test_the_authors_code_has_the_same_codes() -> None:
    """Golden: quant_and_pack_kcache and quant_and_pack_vcache (jy-yuan/KIVI 876b4d2, quant/new_pack.py) on the CPU,
    read back by their unpack_tensor; torch.randn(16, 16) twice from seed 2, groups of 8, one digit for each code.

    Their scales stay float32 here and ours are float16, so now and then a number half way between two codes goes the
    other way: with seeds 0, 1 and 2, in both bits, 4 of 3,072 did. None does with seed 2.
    """
    draw = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(16, 16, generator=draw) for _ in range(2))
    for bits, expected_keys, expected_values in GOLDEN:
        part = encode(KIVI(bits, group=8, residual=16), keys, values)
        for packed, expected in ((part.packed_keys, expected_keys), (part.packed_values, expected_values)):
            assert ["".join(f"{code:x}" for code in row) for row in packed.unpack().tolist()] == expected.split()


GOLDEN = (
    (
        2,
        "1200020102103011 0012213311332223 1321011022001001 1103231320100201 3001131330312123 3122302133320100 "
        "2032302301102012 2132231300301330 1231212110021200 3023313120133111 1322202022220321 2201210312301002 "
        "3212020033222003 0112022301021210 0120011100222233 1222033223120230",
        "2033111020331100 2123231003220303 1110023112323303 2031220120312311 1330123121320121 3231222002213121 "
        "2321020212321102 2202233023210320 3032132232331310 2013100110321312 1111023203113121 1012311132102111 "
        "1013013021301023 3301312002232321 0310123221302323 1111032121223002",
    ),
    (
        4,
        "39201c050a62f165 015895fd75efbbad 4f940560ab005016 360f9f3f80610926 f0153f6df1e3979f d4bad1a7ffd82400 "
        "92d9f09e2470a27b c3f9ce4d21f05ff1 7af3a6a6412c6800 f08ff4f4804ff763 7fc880a09cb92f97 aa06970f5cf0500a "
        "eb7b1900ff8c820f 066c2a9d27085c72 25a02657018bbcfd 5bb80ff99f5a0af0",
        "c0fd463091fd4420 849ebf602eac0e2f 753208f45ae8ff0e 90f79815a0f7ad37 4df069f487f80687 e8f4899008a6f5b4 "
        "bf942a0858fb3308 bb1b9fd0beb60fc2 e0fb5d99fbdf7d60 805f402450fa7e78 377308fa0f34d593 3039f645fa50a767 "
        "426f06d286f160cf dd15f3c00bbdcf86 0f416adab5f09ebd 43460fa6b398f208",
    ),
)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_those_held_and_known_beforehand(bits: int) -> None:
    method = KIVI(bits, group=8, residual=16)
    for n in (16, 64):
        part = encode(method, torch.randn(n, 16), torch.randn(n, 24))
        tensors = [part.positions]
        for packed in (part.packed_keys, part.packed_values):
            tensors += [packed.codes, packed.scale, packed.zero]
        assert part.nbytes == sum(x.untyped_storage().nbytes() for x in tensors)
        assert part.nbytes - part.positions.nbytes == method.bytes_for(n, 16, 24, 4)
        scales = 4 * (n // 8 * 16 + n * 3)
        assert part.payload == (n * 40 * bits // 8, scales) and part.metadata == scales + 4 * n


def test_what_fills_no_block_is_counted_whole() -> None:
    method = KIVI(4, group=8, residual=16)
    assert method.bytes_for(15, 16, 16, 4) == 15 * 32 * 4
    assert method.bytes_for(37, 16, 16, 2) == method.bytes_for(32, 16, 16, 2) + 5 * 32 * 2
    assert method.bytes_for(0, 16, 16, 4) == 0


def test_published_bytes() -> None:
    """2 bits and groups of 32: 2 + 32 / 32 = 3 bits a number, 5.3 times less than in 16."""
    assert KIVI(2).bytes_for(1024, 128, 128, 2) * 8 == 1024 * 256 * 3


def test_heads_do_not_meet() -> None:
    """A head of a batch is what it is alone, whatever the others hold."""
    draw, method = torch.Generator().manual_seed(0), KIVI(2, group=8, residual=16)
    x = torch.randn(80, 16, generator=draw)
    together = encode(method, x, -x, ((16, 0), (48, 16)))
    for start, end in ((0, 16), (16, 64), (64, 80)):
        alone = encode(method, x[start:end], -x[start:end])
        assert torch.equal(together.keys(start, end), alone.keys(0, end - start))
        assert torch.equal(together.values(start, end), alone.values(0, end - start))


def test_outlying_channels_cost_the_others_nothing() -> None:
    """One channel a thousand times as large: by channel its neighbours keep their grid, by token they lose it."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 1000
    part = encode(KIVI(4, group=16, residual=32), x, x)
    others = [i for i in range(16) if i != 3]
    assert float((part.keys(0, 32) - x)[:, others].abs().max()) < 0.2
    assert float((part.values(0, 32) - x)[:, others].abs().max()) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(32, 16).to(dtype)
    part = encode(KIVI(8, group=16, residual=32), x, x)
    assert part.read().keys.dtype == part.read().values.dtype == dtype
    torch.testing.assert_close(part.read().keys, x, atol=0.03, rtol=0.02)
    assert part.logits(x[None, None, :2], (slice(None), slice(None))).dtype == dtype


def test_as_a_method_it_keeps_everything() -> None:
    tokens = place(KIVI(), random_row(30))
    assert kept(tokens, decide(KIVI(), 0.3, tokens)) == [list(range(30))] * 2
    same_alone_and_padded(KIVI(), 1.0, filler=torch.nan)


def test_names() -> None:
    assert resolve("kivi") == KIVI() and resolve("kivi-2bit") == KIVI(bits=2)
    assert resolve_store("kivi-8bit") == KIVI(bits=8)
    with pytest.raises(FewerError, match="bits=5"):
        resolve("kivi-5bit")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(FewerError, match="residual=100 must be a multiple of group=32"):
        KIVI(residual=100)
    for group, residual in ((0, 32), (32, 0), (-8, 64)):
        with pytest.raises(FewerError, match="at least 1"):
            KIVI(group=group, residual=residual)


def test_features_that_do_not_divide_are_refused_with_what_would_do() -> None:
    KIVI().check(64, 64)
    with pytest.raises(
        FewerError, match="KIVI: values of 80 features do not divide into groups of 32; choose group=16"
    ):
        KIVI().check(80, 80)
    with pytest.raises(FewerError, match="choose group=20"):
        KIVI(residual=160).check(20, 20)
    with pytest.raises(FewerError, match="12 numbers in 3 bits do not fill whole bytes"):
        KIVI(3, group=4, residual=16).check(12, 16)


def test_what_one_call_packs_is_no_view() -> None:
    part = encode(KIVI(8, group=8, residual=16), torch.randn(16, 16), torch.randn(16, 16))
    assert isinstance(part.packed_keys, Packed)
    for packed in (part.packed_keys, part.packed_values):
        for x in (packed.codes, packed.scale, packed.zero):
            assert x.untyped_storage().nbytes() == x.nbytes
