"""Packed parts: the books, heads unpacked piece by piece, and parts that are joined without packing anything anew."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fewer import codec
from fewer.codec import Codec, Coded, joined, unpacked
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.kivi import KIVI
from fewer.ragged import Ragged

D, E, GROUP = 16, 24, 8
CODECS: dict[str, Any] = {
    "kivi": KIVI(4, GROUP, 16),
    "kivi-3bit": KIVI(3, GROUP, 8),
    "gear": GEAR(4, GROUP, sparsity=0.05, block=16),
    "gear-l": GEAR(2, GROUP, rank=2, sparsity=0.0, block=8),
}
EVEN, UNEVEN = ((32, 32), (32, 32)), ((16, 48), (0, 32))
ALL = (slice(None), slice(None))


def plain(counts: Any, seed: int = 0, *, start: int = 0, placed: bool = False, mass: bool = False) -> Ragged:
    """Random tokens; each head's positions count from `start`."""
    draw, total = torch.Generator().manual_seed(seed), sum(sum(row) for row in counts)
    positions = torch.cat([torch.arange(start, start + n, dtype=torch.int32) for row in counts for n in row])
    return Ragged(
        torch.randn(total, D, generator=draw),
        torch.randn(total, E, generator=draw),
        positions,
        counts,
        positions + 100 if placed else None,
        torch.rand(total, generator=draw) + 1 if mass else None,
    )


def encode(name: str, tokens: Ragged, phase: Any = "prefill") -> Any:
    return CODECS[name].encode(tokens, phase, {})


def same(one: Ragged, two: Ragged) -> None:
    assert one.counts == two.counts
    for name in ("keys", "values", "positions", "placed", "mass"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name


@pytest.mark.parametrize("name", CODECS)
def test_codecs_are_codecs_and_parts_are_parts(name: str) -> None:
    part = encode(name, plain(EVEN))
    assert isinstance(CODECS[name], Codec) and isinstance(part, Coded)
    assert part.counts == EVEN and part.read().keys.shape == (128, D) and part.read().values.shape == (128, E)


@pytest.mark.parametrize("at_once", [1, 8, 20, 40, 1 << 14])
@pytest.mark.parametrize("name", CODECS)
def test_products_are_those_of_what_was_read(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens are unpacked at once."""
    monkeypatch.setattr(codec, "UNPACKED_TOKENS", at_once)
    part = encode(name, plain(EVEN))
    read, query, weights = part.read(), torch.randn(2, 2, 3, D), torch.rand(2, 2, 3, 32)
    torch.testing.assert_close(part.logits(query, ALL), read.logits(query, ALL))
    torch.testing.assert_close(part.mix(weights, ALL), read.mix(weights, ALL))
    for at in ((slice(0, 1), slice(None)), (slice(1, 2), slice(1, 2))):
        torch.testing.assert_close(part.logits(query[at], at), read.logits(query[at], at))
        torch.testing.assert_close(part.mix(weights[at], at), read.mix(weights[at], at))
    part = encode(name, plain(UNEVEN))
    read = part.read()
    for row in range(2):
        for head, count in enumerate(UNEVEN[row]):
            at, w = (slice(row, row + 1), slice(head, head + 1)), torch.rand(1, 1, 3, count)
            torch.testing.assert_close(part.logits(query[at], at), read.logits(query[at], at))
            torch.testing.assert_close(part.mix(w, at), read.mix(w, at))


@pytest.mark.parametrize(("at_once", "expected"), [(1 << 14, 128), (40, 32), (70, 64), (20, 16), (8, 8), (1, 8)])
def test_no_more_is_unpacked_than_said(at_once: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "UNPACKED_TOKENS", at_once)
    part, seen = encode("kivi", plain(EVEN)), []

    def watched(start: int, end: int) -> Tensor:
        seen.append(end - start)
        return torch.zeros(end - start, D)

    object.__setattr__(part, "keys", watched)
    part.logits(torch.randn(2, 2, 1, D), ALL)
    assert max(seen) == unpacked(part, ALL) == expected and sum(seen) == 128


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_taken_and_repeated(name: str) -> None:
    tokens = plain(UNEVEN, placed=True, mass=True)
    part = encode(name, tokens)
    for index in ([1, 0], [1], [0, 0, 1]):
        same(part.rows(index).read(), part.read().rows(index))
    assert part.rows([0, 1]).nbytes == part.nbytes


@pytest.mark.parametrize("first", [EVEN, UNEVEN])
@pytest.mark.parametrize("name", CODECS)
def test_joining_appends_to_each_head(name: str, first: Any) -> None:
    """Each head holds what it held, bit for bit, and then the new part's entries."""
    a, b = encode(name, plain(first, 1)), encode(name, plain(((16, 16), (48, 0)), 2, start=48))
    both = joined([a], b)
    assert isinstance(both, Coded)
    assert both.counts == tuple(
        tuple(x + y for x, y in zip(*rows, strict=True)) for rows in zip(a.counts, b.counts, strict=True)
    )
    read, one, two = both.read(), a.read(), b.read()
    for row in range(2):
        for head in range(2):
            (i, j), (k, m), (p, q) = (x.bounds[row][head] for x in (read, one, two))
            assert torch.equal(read.keys[i:j], torch.cat([one.keys[k:m], two.keys[p:q]]))
            assert torch.equal(read.values[i:j], torch.cat([one.values[k:m], two.values[p:q]]))
            assert torch.equal(read.positions[i:j], torch.cat([one.positions[k:m], two.positions[p:q]]))
    assert both.nbytes == a.nbytes + b.nbytes and both.metadata == a.metadata + b.metadata


def test_joining_three_is_joining_one_after_the_other() -> None:
    parts = [encode("gear", plain(EVEN, seed)) for seed in range(3)]
    all_three = parts[0].join(parts[1]).join(parts[2])
    assert all_three.counts == ((96, 96), (96, 96))
    expected = torch.cat([part.read().keys.view(4, 32, D) for part in parts], 1)
    assert torch.equal(all_three.read().keys.view(4, 96, D), expected)


def test_positions_and_masses_are_spelled_out_where_one_part_has_them() -> None:
    a, b = encode("kivi", plain(EVEN, placed=True)), encode("kivi", plain(EVEN, mass=True))
    read = a.join(b).read()
    assert torch.equal(
        read.placed.view(4, 2, 32),
        (read.positions + torch.tensor([100, 0]).repeat(4).repeat_interleave(32)).view(4, 2, 32),
    )
    assert torch.equal(read.mass.view(4, 2, 32)[:, 0], torch.ones(4, 32)) and bool(
        (read.mass.view(4, 2, 32)[:, 1] > 1).all()
    )


def test_parts_of_other_kinds_stay_apart() -> None:
    tokens = plain(EVEN)
    kivi = encode("kivi", tokens)
    assert joined([], kivi) is None
    assert joined([tokens], kivi) is None
    assert joined([encode("gear", tokens)], kivi) is None
    assert joined([KIVI(8, GROUP, 16).encode(tokens, "prefill", {})], kivi) is None
    assert joined([GEAR(4, GROUP, rank=2, block=16).encode(tokens, "prefill", {})], encode("gear", tokens)) is None
    assert unpacked(tokens, (slice(0, 1), slice(None))) == 64
