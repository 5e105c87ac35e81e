"""GEAR: few bits, a low-rank part of the error, and exact outliers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.bits import BITS, Packed
from fewer.mended import Mended, low_rank
from fewer.methods import resolve, resolve_store
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.kivi import KIVI
from fewer.ragged import Ragged
from fewer.types import FewerError
from tests.methods.kv.build import decide, kept, place, random_row, same_alone_and_padded


def encode(method: Any, keys: Tensor, values: Tensor, counts: Any = None, phase: Any = "prefill") -> Any:
    n = len(keys)
    positions = torch.arange(n, dtype=torch.int32)
    return method.encode(Ragged(keys, values, positions, counts or ((n,),)), phase, {})


def like_keys(n: int, d: int, seed: int = 0) -> Tensor:
    """As keys are: a few channels far from zero, tokens that differ in few directions, and now and then a spike."""
    draw = torch.Generator().manual_seed(seed)
    mean = torch.randn(d, generator=draw)
    mean[:: d // 4] *= 10
    x = mean + torch.randn(n, 4, generator=draw) @ torch.randn(4, d, generator=draw) / 2
    x = x + 0.3 * torch.randn(n, d, generator=draw)
    return x + (torch.rand(n, d, generator=draw) < 0.01) * torch.randn(n, d, generator=draw) * 8


def loss(x: Tensor, back: Tensor) -> float:
    """Size of the error, of the size of what it should be."""
    return float((back - x).norm() / x.norm())


def test_worked_example() -> None:
    """Four tokens of one channel, one group, 2 bits: 0, 1, 2 and 99, and half of them exact.

    The mean is 25.5: farthest above is 99, farthest below is 0. Both become 25.5 for packing, and 1, 2, 25.5, 25.5 have
    steps of 24.5 / 3 from 1: 2 goes to 1, an error of 1. Rank 0 leaves it; the outliers come back as they were. Rank 1
    is all there is of one channel, so nothing is left of the error.
    """
    x = torch.tensor([[0.0], [1.0], [2.0], [99.0]])
    made = Mended.of(x, [4], 2, 4, 0.5, 0, by_token=False)
    assert made.places.tolist() == [[3, 0]] and made.exact.tolist() == [[99, 0]]
    assert made.packed.unpack().flatten().tolist() == [3, 0, 0, 3]
    assert made.tensor(0, 4, torch.float32).flatten().tolist() == [0, 1, 1, 99]
    made = Mended.of(x, [4], 2, 4, 0.5, 1, by_token=False)
    torch.testing.assert_close(made.tensor(0, 4, torch.float32), x, atol=1e-3, rtol=0)


def naive(
    x: Tensor, bits: int, group: int, sparsity: float, by_token: bool
) -> tuple[Tensor, dict[tuple[int, int], float]]:
    """Packed numbers and outliers, group of tokens after group, by sorting in python."""
    n, d = x.shape
    outliers: dict[tuple[int, int], float] = {}
    without = x.clone()
    for start in range(0, n, group):
        part = x[start : start + group]
        mean = part.mean(1, keepdim=True).expand_as(part) if by_token else part.mean(0, keepdim=True).expand_as(part)
        away = sorted((float(part[i, j] - mean[i, j]), i, j) for i in range(group) for j in range(d))
        half = int(sparsity / 2 * group * d)
        for _, i, j in away[:half] + away[len(away) - half :]:
            outliers[start + i, j] = float(x[start + i, j].half())
            without[start + i, j] = mean[i, j]
    packed = Packed.of(without, bits, **({"channels": group} if by_token else {"tokens": group})).tensor()
    return packed, outliers


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_agrees_with_the_reference(bits: int, by_token: bool) -> None:
    x = like_keys(48, 16)
    packed, outliers = naive(x, bits, 8, 0.05, by_token)
    made = Mended.of(x, [48], bits, 8, 0.05, 0, by_token=by_token)
    expected = packed.clone()
    for at, value in outliers.items():
        expected[at] = value
    assert len(outliers) == made.places.numel() == 6 * 2 * 3
    torch.testing.assert_close(made.tensor(0, 48, torch.float32), expected)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_low_rank_part_is_nearly_the_best_there_is(rank: int) -> None:
    """The best of a rank is the singular value decomposition's; three loops come close, from any start."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=draw) @ torch.randn(4, 16, generator=draw) + 0.1 * torch.randn(
        64, 16, generator=draw
    )
    left, right = low_rank(x, rank)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = (x - u[:, :rank] * s[:rank] @ v[:rank]).norm()
    assert best <= (x - left @ right).norm() * (1 + 1e-5) and (x - left @ right).norm() <= 1.2 * best
    torch.testing.assert_close(left.T @ left, torch.eye(rank), atol=1e-5, rtol=0)


def test_low_rank_matrices_are_found_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=draw) @ torch.randn(2, 16, generator=draw)
    for size in (1e-20, 1.0, 1e15):
        left, right = low_rank(x * size, 2)
        torch.testing.assert_close(left @ right, x * size, rtol=1e-4, atol=1e-4 * size)
    left, right = low_rank(torch.zeros(40, 16), 2)
    assert not bool((left @ right).any()) and bool(left.isfinite().all())


def test_the_start_is_always_the_same() -> None:
    x = torch.randn(40, 16)
    first = low_rank(x, 3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, low_rank(x, 3), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outliers_are_exact(dtype: torch.dtype) -> None:
    """Spikes of float16's own numbers come back bit for bit, low-rank part or not."""
    x = (like_keys(64, 16).half().to(dtype).half()).to(dtype)
    for by_token in (False, True):
        made = Mended.of(x, [64], 2, 16, 0.1, 4, by_token=by_token)
        back = made.tensor(0, 64, dtype).view(4, -1).gather(1, made.places.long())
        assert torch.equal(back, x.view(4, -1).gather(1, made.places.long()))
        assert back.dtype == dtype


def test_numbers_beyond_float16_stay_finite() -> None:
    x = like_keys(32, 16)
    x[3, 4] = 1e30
    assert bool(Mended.of(x, [32], 4, 8, 0.1, 2, by_token=False).tensor(0, 32, torch.float32).isfinite().all())


def test_the_authors_code_errs_as_much_without_outliers_and_more_with_them() -> None:
    """Golden: Simulated/compress_function.py (HaoKang-Timmy/GEAR efe0bfe) on like_keys(512, 128): relative errors of
    tokenwise_gearlkivi_channelQ and _tokenQ (GEAR-L), and of gearslkivi_channelQ_new and _tokenQ_new with sparsity
    0.02, all with groups of 64, rank 4 and 3 loops. Its start is random: GEAR-L moves by 1 % between two calls.

    Of 512 tokens its keys have one outlier at either end of each channel, where 2 % would be five (its count grows with
    the heads and not with the tokens); so ours, which are 2 %, lose a third less.
    """
    x = like_keys(512, 128)
    golden = {
        (2, False): (0.3287, 0.2271),
        (2, True): (0.5779, 0.3872),
        (4, False): (0.0629, 0.0449),
        (4, True): (0.1466, 0.0833),
    }
    for (bits, by_token), (dense, sparse) in golden.items():
        ours = [
            loss(x, Mended.of(x, [512], bits, 64, share, 4, by_token=by_token).tensor(0, 512, torch.float32))
            for share in (0.0, 0.02)
        ]
        assert ours[0] == pytest.approx(dense, rel=0.02)
        assert ours[1] < 0.9 * sparse


def backbone(x: Tensor, bits: int, group: int, by_token: bool) -> tuple[int, float]:
    packed = Packed.of(x, bits, **({"channels": group} if by_token else {"tokens": group}))
    return packed.nbytes, loss(x, packed.tensor())


def gear(x: Tensor, bits: int, by_token: bool, sparsity: float = 0.02, rank: int = 4) -> tuple[int, float]:
    """The published settings."""
    made = Mended.of(x, [len(x)], bits, 64, sparsity, rank, by_token=by_token)
    return sum(made.payload), loss(x, made.tensor(0, len(x), torch.float32))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_at_equal_bytes_it_errs_less_than_its_backbone_on_keys(seed: int, bits: int) -> None:
    """1,024 keys of 128 channels: 3.7 bits a number in 2 bits, 5.7 in 4. The backbone gets as many bits, and takes them
    for groups of 16, which are 4 and 6; in 4 bits no other choice of bits and groups that takes less than that errs
    less either."""
    x = like_keys(1024, 128, seed)
    held, error = gear(x, bits, by_token=False)
    more, plain = backbone(x, bits, 16, by_token=False)
    assert held < more and error < 0.85 * plain
    if bits == 4:
        for other in (2, 3, 4):
            for group in (8, 16, 32, 64, 128, 256, 512, 1024):
                size, plain = backbone(x, other, group, by_token=False)
                assert size > more or error < plain


def test_where_it_errs_more_than_its_backbone() -> None:
    """Normal numbers have no outliers and share no directions, so smaller groups are worth more. And in 2 bits a third
    bit is worth more than both corrections, even on keys."""
    normal = torch.randn(1024, 128, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4):
        held, error = gear(normal, bits, by_token=False)
        more, plain = backbone(normal, bits, 16, by_token=False)
        assert held < more
        assert error > plain
    x = like_keys(1024, 128)
    (held, error), (third, plain) = gear(x, 2, by_token=False), backbone(x, 3, 32, by_token=False)
    assert abs(third - held) < 0.1 * held and plain < error


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_each_correction_helps(bits: int, by_token: bool) -> None:
    x = like_keys(256, 64)
    errors = [gear(x, bits, by_token, share, rank)[1] for share, rank in ((0.0, 0), (0.0, 4), (0.02, 0), (0.02, 4))]
    assert errors[0] == pytest.approx(backbone(x, bits, 64, by_token)[1], rel=1e-5)
    assert errors[3] < errors[1] < errors[0] and errors[3] < errors[2] < errors[0]


@pytest.mark.parametrize(
    "method", [GEAR(2, 8, block=16), GEAR(3, 8, sparsity=0.0, block=8), GEAR(4, 8, rank=0, block=32)]
)
def test_bytes_are_those_held_and_known_beforehand(method: GEAR) -> None:
    for n in (32, 64):
        part = encode(method, torch.randn(n, 16), torch.randn(n, 24))
        tensors = [part.positions]
        for made in (part.mended_keys, part.mended_values):
            tensors += [made.packed.codes, made.packed.scale, made.packed.zero, made.left, made.right, made.exact]
            tensors += [made.places]
        assert part.nbytes == sum(x.untyped_storage().nbytes() for x in tensors)
        assert part.nbytes - part.positions.nbytes == method.bytes_for(n, 16, 24, 4)
        assert part.metadata == part.positions.nbytes + sum(
            m.packed.metadata + m.places.nbytes for m in (part.mended_keys, part.mended_values)
        )


def test_bytes_by_hand() -> None:
    """64 tokens of 16 and 16 features, 2 bits, groups of 16, rank 4, one in twenty exact: 2 * 1024 codes in 512 bytes;
    scales and zeros 4 * 16 * 4 + 64 * 4 = 512; four groups of 256 with 12 exact numbers and as many places, twice,
    2 * 4 * 12 * (2 + 2) = 384; factors 2 * 2 * 4 * (64 + 16) = 1280."""
    method = GEAR(2, 16, rank=4, sparsity=0.05, block=16)
    assert method.bytes_for(64, 16, 16, 4) == 512 + 512 + 384 + 1280
    assert method.bytes_for(70, 16, 16, 4) == method.bytes_for(64, 16, 16, 4) + 6 * 32 * 4
    assert method.bytes_for(15, 16, 16, 4) == 15 * 32 * 4


def test_places_take_two_bytes_while_they_can() -> None:
    for group, d, size in ((64, 128, 2), (128, 256, 2), (256, 256, 4)):
        made = Mended.of(torch.randn(group, d), [group], 4, group, 0.01, 1, by_token=False)
        assert made.places.element_size() == size
        assert sum(made.payload) == Mended.bytes_for(group, d, 4, group, 0.01, 1, by_token=False)


def test_blocks_of_decoding_have_their_own_rank() -> None:
    method, x = GEAR(2, 16, rank=4, rank_decode=1, block=16), torch.randn(32, 16)
    assert encode(method, x, x).mended_keys.left.shape == (32, 4)
    assert encode(method, x, x, phase="decode").mended_keys.left.shape == (32, 1)


def test_heads_do_not_meet() -> None:
    """A head of a batch is what it is alone, whatever the others hold; one without tokens holds nothing."""
    method, x = GEAR(2, 8, block=16), like_keys(80, 16)
    together = encode(method, x, -x, ((16, 0), (48, 16)))
    assert together.mended_keys.right.shape == (3, 4, 16)
    for start, end in ((0, 16), (16, 64), (64, 80)):
        alone = encode(method, x[start:end], -x[start:end])
        torch.testing.assert_close(together.keys(start, end), alone.keys(0, end - start))
        torch.testing.assert_close(together.values(start, end), alone.values(0, end - start))


def test_a_head_can_be_read_group_by_group() -> None:
    part = encode(GEAR(2, 8, block=16), like_keys(80, 16), like_keys(80, 16), ((48, 32),))
    whole = part.keys(0, 80)
    for start, end in ((0, 8), (8, 48), (40, 56), (48, 80), (72, 80)):
        torch.testing.assert_close(part.keys(start, end), whole[start:end])


def test_as_a_method_it_keeps_everything() -> None:
    tokens = place(GEAR(), random_row(30))
    assert kept(tokens, decide(GEAR(), 0.3, tokens)) == [list(range(30))] * 2
    same_alone_and_padded(GEAR(), 1.0, filler=torch.nan)


def test_names() -> None:
    assert resolve("gear") == GEAR() and resolve("gear-4bit") == GEAR(bits=4)
    assert resolve_store("gear-2bit") == GEAR() and resolve_store("kivi-2bit") == KIVI(bits=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group": 48}, "block=64 must be a multiple of group=48"),
        ({"group": 0}, "at least 1"),
        ({"sparsity": 1.0}, "not a share"),
        ({"sparsity": -0.1}, "not a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FewerError, match=message):
        GEAR(**settings)


def test_features_that_do_not_fit_are_refused() -> None:
    GEAR().check(64, 128)
    with pytest.raises(FewerError, match="GEAR: values of 80 features do not divide into groups of 64"):
        GEAR().check(64, 80)
    with pytest.raises(FewerError, match=r"rank=4 and rank_decode=70 must lie in \[0, 64\]"):
        GEAR(rank_decode=70).check(128, 128)
    with pytest.raises(FewerError, match="do not fill whole bytes"):
        GEAR(3, 4, block=16).check(12, 16)
