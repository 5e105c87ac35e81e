"""MiniCache: directions shared by two layers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.minicache import MiniCache
from fewer.pairs import Half
from fewer.ragged import Dense, Ragged
from fewer.types import FewerError
from tests.methods.kv.build import decide, kept, place, random_row


def packed(*rows: tuple[Tensor, Tensor]) -> Ragged:
    """One layer's keys and values `(h, n, d)` of each row, packed."""
    longest = max(keys.shape[1] for keys, _ in rows)
    both = [
        torch.stack([torch.nn.functional.pad(x, (0, 0, longest - x.shape[1], 0), value=torch.nan) for x in part])
        for part in zip(*rows, strict=True)
    ]
    left = torch.tensor([longest - keys.shape[1] for keys, _ in rows])
    positions = (torch.arange(longest) - left[:, None])[:, None].expand(both[0].shape[:3])
    return Ragged.pack(Dense(*both, positions, positions, positions < 0), moved=False)


def layers(*lengths: int, like: float = 0.0) -> tuple[Ragged, Ragged]:
    """Two layers of rows of these lengths; the upper one is the lower one to the share `like`."""
    lower, upper = [], []
    for n in lengths:
        one, two = random_row(n, seed=n), random_row(n, seed=n + 100)
        lower.append((one.keys, one.values))
        upper.append(tuple(like * a + (1 - like) * b for a, b in ((one.keys, two.keys), (one.values, two.values))))
    return packed(*lower), packed(*upper)


def encoded(lower: Ragged, upper: Ragged, **settings: Any) -> tuple[Half, Half]:
    first, second = MiniCache(**settings).encode_pair(lower, upper)
    assert isinstance(first, Half) and isinstance(second, Half)
    return first, second


def test_worked_example() -> None:
    """Three tokens of length 2 in the lower layer at 0 degrees, and of length 3 in the upper one at 90, 30 and 20.

    gamma is 0.05, so what is above 90 - 0.05 * 70 = 86.5 degrees stays whole: the first. The others get the directions
    at 0.6 of the way, 18 and 12 degrees.
    """

    def at(length: float, *degrees: float) -> Tensor:
        turns = torch.tensor(degrees) * math.pi / 180
        return length * torch.stack([turns.cos(), turns.sin()], -1)[None]

    lower, upper = at(2, 0, 0, 0), at(3, 90, 30, 20)
    first, second = encoded(packed((lower, lower)), packed((upper, upper)))
    for read in (lambda half: half.read().keys, lambda half: half.read().values):
        torch.testing.assert_close(read(first), at(2, 0, 18, 12)[0])
        torch.testing.assert_close(read(second), at(3, 90, 18, 12)[0])
    assert first.pair.keys.at.tolist() == [0]


def reference(lower: Tensor, upper: Tensor, t: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Both layers of one head `(n, d)` as they are read again, token by token in float64."""
    pairs = [(x.double(), y.double()) for x, y in zip(lower, upper, strict=True)]
    angles = [math.acos(float(x @ y / x.norm() / y.norm())) for x, y in pairs]
    out = []
    for (x, y), angle in zip(pairs, angles, strict=True):
        if angle > max(angles) - gamma * (max(angles) - min(angles)):
            out.append((x, y))
            continue
        e = math.sin((1 - t) * angle) * x / x.norm() + math.sin(t * angle) * y / y.norm()
        e = e / e.norm()
        out.append((x.norm() * e, y.norm() * e))
    return torch.stack([x for x, _ in out]), torch.stack([y for _, y in out])


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.4, 2.0])
@pytest.mark.parametrize("lengths", [(1,), (2,), (40,), (7, 31, 1)])
def test_agrees_with_the_reference(lengths: tuple[int, ...], gamma: float) -> None:
    lower, upper = layers(*lengths, like=0.3)
    halves = [half.read() for half in encoded(lower, upper, gamma=gamma)]
    for row in range(len(lengths)):
        for start, end in lower.bounds[row]:
            for name in ("keys", "values"):
                one, two = (getattr(part, name)[start:end] for part in (lower, upper))
                for half, expected in zip(halves, reference(one, two, 0.6, gamma), strict=True):
                    torch.testing.assert_close(getattr(half, name)[start:end].double(), expected, rtol=1e-4, atol=1e-5)


def test_equal_directions_lose_nothing() -> None:
    """The upper layer is the lower one times a positive number for each token: both come back to rounding."""
    lower, _ = layers(30)
    by = torch.rand(len(lower.keys), 1, generator=torch.Generator().manual_seed(0)) + 0.1
    upper = Ragged(lower.keys * by, lower.values / by, lower.positions, lower.counts)
    first, second = encoded(lower, upper, gamma=0.0)
    assert not len(first.pair.keys.at), "and nothing has to stay whole for it"
    for half, layer in ((first, lower), (second, upper)):
        torch.testing.assert_close(half.read().keys, layer.keys)
        torch.testing.assert_close(half.read().values, layer.values)


def test_opposite_and_empty_directions_are_numbers() -> None:
    one = torch.tensor([[[1.0, 0], [0, 0], [0, 2]]])
    first, second = encoded(packed((one, one)), packed((-one, one)), gamma=0.0)
    assert bool(first.read().keys.isfinite().all()) and bool(second.read().keys.isfinite().all())
    assert first.read().keys[1].tolist() == [0, 0]
    torch.testing.assert_close(first.read().values, one[0])


@pytest.mark.parametrize(("t", "exact"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_the_mix_are_the_layers(t: float, exact: int) -> None:
    both = layers(20)
    half = encoded(*both, interpolation=t)[exact]
    torch.testing.assert_close(half.read().keys, both[exact].keys)


def test_the_other_implementation_mixes_alike() -> None:
    """Golden: minicache_slerp (Zefan-Cai/KVCache-Factory c97f9d7, pyramidkv/minicache.py), defaults.

    Previous and current states are the keys of random_row(12) of seeds 1 and 2; e of head 0 token 3 and of head 1 token
    11, and the angles over pi of token 5. Its ceil(5%) of head 0, token 6, is what our threshold keeps whole too.
    """
    previous, current = random_row(12, seed=1), random_row(12, seed=2)
    direction, angle = MiniCache().mixed(previous.keys, current.keys)
    expected = [
        [-0.273547, -0.025487, 0.730386, 0.094865, -0.250358, 0.542915, -0.144453, -0.061294],
        [0.286202, -0.211419, -0.027055, -0.035984, 0.244206, 0.853831, -0.028249, -0.286183],
    ]
    torch.testing.assert_close(direction[[0, 1], [3, 11]], torch.tensor(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(angle[:, 5] / math.pi, torch.tensor([0.698341, 0.567372]), rtol=0, atol=1e-6)
    halves = encoded(packed((previous.keys, previous.values)), packed((current.keys, current.values)))
    assert [at for at in halves[0].pair.keys.at.tolist() if at < 12] == [6]


# --- the part ---


def test_any_rows_and_any_entries() -> None:
    lower, upper = layers(7, 31, 1, 12)
    for half in encoded(lower, upper, gamma=0.3):
        whole, some = half.read(), half.rows([3, 1, 1])
        again = whole.rows([3, 1, 1])
        assert torch.equal(some.read().keys, again.keys) and torch.equal(some.read().values, again.values)
        assert torch.equal(some.positions, again.positions) and some.counts == again.counts
        for start, end in ((0, 5), (9, 60), (14, 14)):
            assert torch.equal(half.keys(start, end), whole.keys[start:end])


def test_attention_reads_heads() -> None:
    half, _ = encoded(*layers(9, 9))
    query, weights, some = torch.randn(2, 2, 3, 8), torch.rand(2, 2, 3, 9), (slice(1, 2), slice(1, 2))
    dense = half.read().dense()
    torch.testing.assert_close(half.logits(query, (slice(None), slice(None))), query @ dense.keys.transpose(-1, -2))
    torch.testing.assert_close(half.mix(weights[some], some), weights[some] @ dense.values[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_once(dtype: torch.dtype) -> None:
    """n tokens of 2 heads: n directions and twice n lengths, of keys and of values, but two whole vectors and an int32
    for each that stays whole; an int32 position for each. The halves add up to just that."""
    lower, upper = (
        Ragged(part.keys.to(dtype), part.values.to(dtype), part.positions, part.counts) for part in layers(21, 30)
    )
    first, second = encoded(lower, upper)
    total, size, expected = 2 * (21 + 30), dtype.itemsize, 0
    for merged in (first.pair.keys, first.pair.values):
        r = len(merged.at)
        expected += ((total - r) * (8 + 2) + r * 2 * 8) * size + r * 4
        assert 0 < r < total / 2
    assert first.nbytes + second.nbytes == expected + total * 4
    assert abs(first.nbytes - second.nbytes) <= 3
    assert first.read().keys.dtype == dtype


def test_selections_are_shared_while_they_are_used() -> None:
    first, second = encoded(*layers(5, 6))
    one, two = first.rows([1, 0]), second.rows([1, 0])
    assert one.pair is two.pair and one.positions is two.positions
    assert first.rows([0]).pair is not one.pair
    del one, two
    assert not first.pair.made


def test_layers_that_hold_different_tokens_are_no_pair() -> None:
    (lower, _), (_, upper) = layers(5), layers(6)
    with pytest.raises(FewerError, match="the same tokens"):
        MiniCache().encode_pair(lower, upper)
    lower, upper = layers(5)
    weighed = Ragged(upper.keys, upper.values, upper.positions, upper.counts, mass=torch.ones(10))
    with pytest.raises(FewerError, match="stand for several"):
        MiniCache().encode_pair(lower, weighed)


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, []), (2, []), (3, [(1, 2)]), (4, [(2, 3)]), (7, [(3, 4), (5, 6)])]
)
def test_the_upper_half_goes_in_pairs(layers: int, expected: list[tuple[int, int]]) -> None:
    assert MiniCache().couples(layers) == expected


def test_keeps_everything() -> None:
    tokens = place(MiniCache(), random_row(10))
    assert kept(tokens, decide(MiniCache(), 1.0, tokens)) == [list(range(10))] * 2
