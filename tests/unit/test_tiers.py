"""Storage for tiers: runs of any length, numbers for each channel of each, exact bytes."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.mikv import Balanced
from fewer.ragged import Ragged
from fewer.signals import ChannelMaxima, Maxima
from fewer.tiers import ByChannel, ByToken, ChannelSeparable, TierPart, largest
from fewer.types import FewerError

UNEVEN = ((3, 5), (0, 1), (7, 2))
EVEN = ((4, 4), (4, 4))
D, E = 8, 16
HALF = 3e-3
"""What float16 scales are off by, at most, for numbers of this size."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tokens(counts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> Ragged:
    total = sum(map(sum, counts))
    held = normal(total, D + E).to(dtype)
    return Ragged(held[:, :D], held[:, D:], torch.arange(total).int(), tuple(map(tuple, counts)))


def grid(numbers: Sequence[float], bits: int) -> list[float]:
    """Round to nearest between the extremes."""
    low, step = min(numbers), (max(numbers) - min(numbers)) / (2**bits - 1)
    return [low + step * round((x - low) / step) if step else low for x in numbers]


def heads(counts: Sequence[Sequence[int]]) -> list[slice]:
    ends = [0]
    for count in (count for row in counts for count in row):
        ends.append(ends[-1] + count)
    return [slice(a, b) for a, b in pairwise(ends)]


def near(got: Tensor, expected: Sequence[Sequence[float]], step: float) -> None:
    """Equal to float16's accuracy but for numbers half way between two steps, which may go either way."""
    off = (got - torch.tensor(expected)).abs()
    assert bool((off <= step).all()) and float((off > HALF).float().mean()) <= 0.1


def test_a_number_that_is_off_is_seen() -> None:
    with pytest.raises(AssertionError):
        near(torch.tensor([[1.0, 2]]), [[1.0, 2.1]], 0.5)
    with pytest.raises(AssertionError):
        near(torch.ones(1, 100), [[1.6, *[1.0] * 99]], 0.5)


def test_worked_example_by_channel() -> None:
    """2 bits, a head of three tokens of two channels: (0, 1), (1, 1), (3, 1), and one of a single token, (5, 7).

    Channel 0 goes from 0 to 3 in steps of 1, so 1 stays; channel 1 is constant, so its step is 0. A single token is its
    own extremes. Codes 0, 1, 3 and 0, 0, 0; then 0 and 0.
    """
    x = torch.tensor([[0.0, 1], [1, 1], [3, 1], [5, 7]])
    held = ByChannel.of(x, 2, [3, 1])
    assert torch.equal(held.tensor(0, 4, torch.float32), x)
    assert held.scale.tolist() == [[1, 0], [0, 0]] and held.zero.tolist() == [[0, 1], [5, 7]]
    assert held.payload == (4, 16)  # a byte a token; two numbers of two bytes a channel and run


def test_worked_example_by_token() -> None:
    """2 bits, channels divided by 4 and 1: (12, 0) becomes (3, 0), steps of 1, and (4, 2) becomes (1, 2), steps of 1/3.

    Both are extremes of their tokens, so both come out as they were, times 4 and 1.
    """
    x = torch.tensor([[12.0, 0], [4, 2]])
    held = ByToken.of(x, 2, [2], torch.tensor([[4.0, 1]]))
    torch.testing.assert_close(held.tensor(0, 2, torch.float32), x, rtol=1e-3, atol=1e-3)
    assert held.payload == (2, 12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("counts", [UNEVEN, EVEN])
def test_channel_separable_agrees_with_the_reference(counts: Sequence[Sequence[int]], bits: int) -> None:
    packed = tokens(counts)
    part = ChannelSeparable(bits).encode(packed, "prefill", {})
    keys, values = torch.zeros(0, D).tolist(), torch.zeros(0, E).tolist()
    for head in heads(counts):
        columns = [grid(column, bits) for column in packed.keys[head].T.tolist() if column]
        keys += [list(token) for token in zip(*columns, strict=True)]
        c = [math.sqrt(max(abs(x) for x in column)) for column in packed.values[head].T.tolist() if column]
        for token in packed.values[head].tolist():
            scaled = grid([x / by for x, by in zip(token, c, strict=True)], bits)
            values.append([x * by for x, by in zip(scaled, c, strict=True)])
    out = part.read()
    near(out.keys, keys, 8 / (2**bits - 1))
    near(out.values, values, 8 / (2**bits - 1))
    assert torch.equal(out.positions, packed.positions) and out.counts == packed.counts


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_balanced_agrees_with_the_reference(bits: int) -> None:
    packed = tokens(UNEVEN)
    found = Maxima(normal(3, 2, D).abs() + 0.5, normal(3, 2, D).abs().flip(0) + 0.5)
    part = Balanced(bits).encode(packed, "prefill", {ChannelMaxima: found})
    keys = []
    for index, head in enumerate(heads(UNEVEN)):
        b = (found.query.view(-1, D)[index] / found.key.view(-1, D)[index]).sqrt().tolist()
        for token in packed.keys[head].tolist():
            scaled = grid([x * by for x, by in zip(token, b, strict=True)], bits)
            keys.append([x / by for x, by in zip(scaled, b, strict=True)])
    near(part.read().keys, keys, 16 / (2**bits - 1))
    near(part.read().values, [grid(token, bits) for token in packed.values.tolist()], 8 / (2**bits - 1))


def both(counts: Sequence[Sequence[int]], bits: int = 4, dtype: torch.dtype = torch.float32) -> list[TierPart]:
    b, h = len(counts), len(counts[0])
    found = {ChannelMaxima: Maxima(normal(b, h, D).abs() + 0.1, normal(b, h, D).abs() + 0.2)}
    return [codec.encode(tokens(counts, dtype), "prefill", found) for codec in (ChannelSeparable(bits), Balanced(bits))]


@pytest.mark.parametrize("counts", [UNEVEN, EVEN])
def test_any_stretch_reads_as_in_the_whole(counts: Sequence[Sequence[int]]) -> None:
    for part in both(counts):
        whole, total = part.read(), len(part.positions)
        for start in range(total + 1):
            for end in range(start, total + 1):
                assert torch.equal(part.keys(start, end), whole.keys[start:end])
                assert torch.equal(part.values(start, end), whole.values[start:end])


@pytest.mark.parametrize("index", [[0], [1], [2, 0], [1, 1, 2], [2, 2]])
def test_rows_take_their_channels_with_them(index: list[int]) -> None:
    for part in both(UNEVEN):
        some, whole = part.rows(index), part.read().rows(index)
        assert some.counts == whole.counts and torch.equal(some.positions, whole.positions)
        assert torch.equal(some.read().keys, whole.keys) and torch.equal(some.read().values, whole.values)
        again = some.rows(list(range(len(index))))
        assert torch.equal(again.read().keys, whole.keys) and again.nbytes == some.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("codec", [ChannelSeparable, Balanced])
def test_bytes_are_known_before(codec: type, bits: int) -> None:
    for counts in (UNEVEN, EVEN, ((1, 0), (0, 0))):
        part = both(counts, bits)[codec is Balanced]
        asked = sum(codec(bits).bytes_for(count, D, E, 4) for row in counts for count in row)
        assert part.nbytes == asked + part.positions.nbytes
        held = [part.positions, part.held_values.packed.codes, part.held_values.packed.scale]
        assert part.nbytes - sum(x.nbytes for x in held) > 0


@pytest.mark.parametrize("counts", [UNEVEN, EVEN])
def test_products_are_those_of_what_is_read(counts: Sequence[Sequence[int]]) -> None:
    for part in both(counts):
        plain = part.read()
        for row, head in ((0, 0), (0, 1), (2, 0)) if counts == UNEVEN else ((0, 1), (1, 0)):
            at = slice(row, row + 1), slice(head, head + 1)
            query, weights = normal(1, 1, 3, D), normal(1, 1, 3, counts[row][head])
            torch.testing.assert_close(part.logits(query, at), plain.logits(query, at))
            torch.testing.assert_close(part.mix(weights, at), plain.mix(weights, at))
    if counts == EVEN:
        query, everything = normal(2, 2, 3, D), (slice(None), slice(None))
        torch.testing.assert_close(part.logits(query, everything), plain.logits(query, everything))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_comes_out_has_the_models_type(dtype: torch.dtype) -> None:
    for part in both(UNEVEN, dtype=dtype):
        assert part.read().keys.dtype == part.read().values.dtype == dtype


def test_channels_of_nothing_and_of_much() -> None:
    """Channels that are 0 throughout are divided by 1, and so are those whose number float16 cannot hold."""
    x = torch.tensor([[0.0, 3e5], [0.0, -3e5]])
    held = ByToken.of(x, 8, [2], torch.tensor([[0.0, 1e6]]))
    assert held.channel is not None and held.channel.tolist() == [[1, 1]]
    assert bool(held.tensor(0, 2, torch.float32).isfinite().all())
    assert largest(x, [1, 1]).tolist() == [[0, 3e5], [0, 3e5]]


def test_other_bits_and_odd_features_are_refused() -> None:
    for codec in (ChannelSeparable, Balanced):
        with pytest.raises(FewerError, match="2, 3, 4 or 8"):
            codec(5)
        codec(3).check(8, 16)
        with pytest.raises(FewerError, match="3 bits"):
            codec(3).check(8, 12)


def test_a_balancer_without_maxima_says_so() -> None:
    with pytest.raises(FewerError, match="ChannelMaxima"):
        Balanced(4).encode(tokens(EVEN), "prefill", {})


@pytest.mark.parametrize("which", [0, 1])
def test_more_tokens_go_behind_each_heads_own(which: int) -> None:
    """A head that was added to has two runs, each with channels of its own, and reads as both did."""
    first, second = both(UNEVEN)[which], both(((1, 0), (2, 3), (0, 4)))[which]
    joined = first.join(second)
    assert joined is not None and joined.counts == ((4, 5), (2, 4), (7, 6))
    one, two, out = first.read(), second.read(), joined.read()
    for row in range(3):
        for head in range(2):
            a, b, c = (slice(*x.bounds[row][head]) for x in (one, two, out))
            assert torch.equal(out.keys[c], torch.cat([one.keys[a], two.keys[b]]))
            assert torch.equal(out.values[c], torch.cat([one.values[a], two.values[b]]))
    assert joined.nbytes == first.nbytes + second.nbytes
    for start, end in ((0, 4), (3, 4), (2, 20), (11, 12)):
        assert torch.equal(joined.keys(start, end), out.keys[start:end])
    again = joined.rows([2, 0])
    assert torch.equal(again.read().keys, out.rows([2, 0]).keys)


def test_only_parts_of_one_form_go_together() -> None:
    by_channel, by_token = both(EVEN)
    assert by_channel.join(by_token) is None and by_token.join(by_channel) is None
    for part, other in zip(both(EVEN, 4), both(EVEN, 2), strict=True):
        assert part.join(other) is None
    for part, other in zip(both(EVEN), both(EVEN, dtype=torch.float16), strict=True):
        assert part.join(other) is None
    plain = ByToken.of(normal(4, 8), 4, [4])
    assert plain.stack(ByToken.of(normal(4, 8), 4, [4], torch.ones(1, 8))) is None
