"""Packed storage of uneven heads: nothing is lost on the way in, out, between rows or between batches."""

from dataclasses import replace

import pytest
import torch

from fewer.ragged import Dense, Ragged, extent, runs


def rectangle(b: int = 2, h: int = 3, n: int = 6, d: int = 4, e: int = 2, seed: int = 0) -> Dense:
    draw = torch.Generator().manual_seed(seed)
    positions = torch.arange(n).expand(b, h, n).contiguous()
    return Dense(
        torch.randn(b, h, n, d, generator=draw),
        torch.randn(b, h, n, e, generator=draw),
        positions,
        positions + 100,
        torch.zeros(b, h, n, dtype=torch.bool),
    )


UNEVEN = ((1, 6, 0), (3, 2, 4))
EVEN = ((4, 4, 4), (4, 4, 4))


def only(dense: Dense, counts: tuple[tuple[int, ...], ...]) -> Dense:
    """The same rectangle with the last `count` tokens of each row and head, the others called padding."""
    n = dense.keys.shape[2]
    return replace(dense, padding=torch.arange(n) < n - torch.tensor(counts).unsqueeze(-1))


def packed(counts: tuple[tuple[int, ...], ...] = UNEVEN, moved: bool = False, seed: int = 0) -> Ragged:
    return Ragged.pack(only(rectangle(seed=seed), counts), moved=moved)


def numbered(counts: tuple[tuple[int, ...], ...]) -> Ragged:
    """Any number of rows; each entry's key is its place in storage."""
    places = torch.arange(sum(map(sum, counts)))
    return Ragged(places.float().unsqueeze(-1), places.float().unsqueeze(-1), places, counts)


def same(a: Ragged, b: Ragged) -> None:
    assert a.counts == b.counts
    assert (a.placed is None) == (b.placed is None)
    for name in ("keys", "values", "positions", *(() if a.placed is None else ("placed",))):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def held(ragged: Ragged, dense: Dense) -> None:
    """Every head holds the last of its rectangle's tokens."""
    for row, spans in enumerate(ragged.bounds):
        for head, (start, end) in enumerate(spans):
            count = ragged.counts[row][head]
            assert end - start == count
            last = slice(dense.keys.shape[2] - count, None)
            assert torch.equal(ragged.keys[start:end], dense.keys[row, head, last])
            assert torch.equal(ragged.values[start:end], dense.values[row, head, last])
            assert torch.equal(ragged.positions[start:end].long(), dense.positions[row, head, last])


def test_same_sees_a_difference() -> None:
    same(packed(), packed())
    for other in (packed(EVEN), packed(moved=True), packed(seed=1)):
        with pytest.raises(AssertionError):
            same(packed(), other)


def test_held_sees_a_difference() -> None:
    with pytest.raises(AssertionError):
        held(packed(), rectangle(seed=1))


@pytest.mark.parametrize("counts", [UNEVEN, EVEN])
def test_packing_copies_the_survivors_head_after_head(counts: tuple[tuple[int, ...], ...]) -> None:
    dense = rectangle()
    ragged = Ragged.pack(only(dense, counts), moved=False)
    assert ragged.counts == counts and ragged.placed is None
    held(ragged, dense)
    dense.keys.zero_()  # a copy: what was packed does not hang on the rectangle
    held(ragged, rectangle())


def test_worked_example() -> None:
    """One row, two heads with 1 and 3 tokens: entries 0 and 1 to 3; the first head is padded twice at the front."""
    keys = torch.tensor([[[[1.0], [2], [3]], [[4], [5], [6]]]])
    dense = Dense(keys, keys, torch.arange(3).expand(1, 2, 3), torch.arange(3).expand(1, 2, 3), keys[..., 0] < 0)
    hidden = torch.tensor([[[True, False, True], [False] * 3]])
    ragged = Ragged.pack(replace(dense, padding=hidden), moved=False)
    assert ragged.keys.flatten().tolist() == [2, 4, 5, 6]
    assert ragged.bounds == [[(0, 1), (1, 4)]] and ragged.even is None
    again = ragged.dense()
    assert again.keys[..., 0].tolist() == [[[0, 0, 2], [4, 5, 6]]]
    assert again.positions.tolist() == again.placed.tolist() == [[[-1, -1, 1], [0, 1, 2]]]
    assert again.padding.tolist() == [[[True, True, False], [False] * 3]]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("counts", [UNEVEN, EVEN])
def test_dense_and_back(counts: tuple[tuple[int, ...], ...], moved: bool) -> None:
    ragged = packed(counts, moved)
    dense = ragged.dense()
    assert dense.keys.shape == (2, 3, max(max(row) for row in counts), 4)
    assert torch.equal((~dense.padding).sum(-1), torch.tensor(counts))
    assert torch.equal(dense.placed, dense.positions + 100 * (~dense.padding) if moved else dense.positions)
    same(Ragged.pack(dense, moved=moved), ragged)


def test_even_heads_are_a_view() -> None:
    ragged = packed(EVEN)
    assert ragged.even == 4
    assert ragged.dense().keys.data_ptr() == ragged.keys.data_ptr()
    assert packed(((2, 2, 2), (2, 2, 3))).even is None


def test_runs_are_what_one_product_can_read() -> None:
    """Rows 0 and 1 hold 4 everywhere, row 2 is uneven, rows 3 and 4 are uneven in the same way, row 5 has 4 again."""
    counts = ((4, 4, 4), (4, 4, 4), (2, 2, 5), (1, 3, 3), (1, 3, 3), (4, 4, 4))
    part, every = numbered(counts), slice(0, 3)
    expected = [
        (slice(0, 2), every),
        *((slice(2, 3), heads) for heads in (slice(0, 2), slice(2, 3))),
        *((slice(row, row + 1), heads) for row in (3, 4) for heads in (slice(0, 1), slice(1, 3))),
        (slice(5, 6), every),
    ]
    assert runs([part]) == expected
    assert [extent(part, at) for at in expected[:3]] == [(0, 24, 2, 3), (24, 28, 1, 2), (28, 33, 1, 1)]
    other = numbered(((1, 1, 1), (2, 2, 2)))
    assert runs([numbered(counts[:2]), other]) == [(slice(0, 1), every), (slice(1, 2), every)]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("index", [[0], [1, 0], [1, 1, 0, 1]])
def test_rows(index: list[int], moved: bool) -> None:
    ragged = packed(UNEVEN, moved)
    some = ragged.rows(index)
    assert some.counts == tuple(UNEVEN[row] for row in index)
    width = max(max(UNEVEN[row]) for row in index)
    for name in ("keys", "positions", "placed", "padding"):
        whole = getattr(ragged.dense(), name)[index]
        assert torch.equal(getattr(some.dense(), name), whole[:, :, whole.shape[2] - width :]), name
    same(ragged.rows([0, 1]), ragged)


def test_stacking_puts_rows_under_each_other() -> None:
    a, b = packed(UNEVEN), packed(EVEN, seed=1)
    both = Ragged.stack([a, b])
    same(both.rows([0, 1]), a)
    same(both.rows([2, 3]), b)
    same(Ragged.stack([a.rows([0]), a.rows([1])]), a)


def test_stacking_moved_rows_with_unmoved_ones() -> None:
    """Rows that were not moved are placed where they are."""
    a, b = packed(UNEVEN, moved=True), packed(EVEN, seed=1)
    both = Ragged.stack([a, b])
    assert both.placed is not None and a.placed is not None
    assert torch.equal(both.placed, torch.cat([a.placed, b.positions]))


def test_bytes() -> None:
    """16 entries: keys 4 and values 2 float32 wide, a position of 4 bytes, and 4 more where keys were moved."""
    entries = sum(sum(row) for row in UNEVEN)
    assert (packed().metadata, packed().nbytes) == (4 * entries, entries * (16 + 8 + 4))
    assert (packed(moved=True).metadata, packed(moved=True).nbytes) == (8 * entries, entries * (16 + 8 + 8))


def test_half_precision_stays() -> None:
    dense = rectangle()
    half = Dense(dense.keys.half(), dense.values.half(), dense.positions, dense.placed, dense.padding)
    ragged = Ragged.pack(only(half, UNEVEN), moved=False)
    assert ragged.keys.dtype == ragged.values.dtype == ragged.dense().keys.dtype == torch.float16
