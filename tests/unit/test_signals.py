"""Observers gather, over several forwards and with padding, what a single look at everything would give."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fewer.score import attention
from fewer.signals import (
    ROTARY_NEEDS,
    Moments,
    Observer,
    Queries,
    QueryMoments,
    QueryWindow,
    Received,
    Rotation,
    Step,
)
from fewer.types import Need
from tests.methods.kv import naive
from tests.methods.kv.build import HalfRotary, Row, random_row

HEADS, KV_HEADS, DIM = 4, 2, 8
NEEDS = (Queries(3), Received(), Moments(2), Rotation())


def feed(observer: Observer, rows: Sequence[Row], ends: Sequence[int], softcap: float | None = None) -> None:
    """Show rows, padded at the front, in forwards that end at `ends`."""
    longest = max(len(row) for row in rows)
    query, keys = (
        torch.stack([torch.nn.functional.pad(part, (0, 0, longest - part.shape[1], 0), value=30.0) for part in parts])
        for parts in zip(*((row.query, row.keys) for row in rows), strict=True)
    )
    seen = torch.tensor([len(row) for row in rows]).unsqueeze(1)
    positions = (torch.arange(longest) - (longest - seen)).clamp(min=-1)
    wide = positions.unsqueeze(1).expand(-1, keys.shape[1], -1)
    for start, end in zip([0, *ends], [*ends, longest], strict=True):
        held = keys[:, :, :end], wide[:, :, :end], wide[:, :, :end] < 0
        shown = positions[:, start:end]
        observer.observe(
            Step(query[:, :, start:end], shown, shown < 0, lambda held=held: held, DIM**-0.5, softcap, HalfRotary(DIM))
        )


def window(observer: Observer) -> QueryWindow:
    value = observer.value()
    assert isinstance(value, QueryWindow)
    return value


def moments(observer: Observer) -> QueryMoments:
    value = observer.value()
    assert isinstance(value, QueryMoments)
    return value


def total(observer: Observer) -> Tensor:
    value = observer.value()
    assert isinstance(value, Tensor)
    return value


# --- what they have in common ---


@pytest.mark.parametrize("need", NEEDS)
def test_needs_are_plain_data_that_start_observers(need: Need) -> None:
    assert need == written_again(need) and hash(need) == hash(written_again(need))
    observer = need.start()
    assert isinstance(need, Need) and isinstance(observer, Observer)
    assert observer.value() is None and observer.nbytes == 0
    observer.rows(torch.tensor([0, 0]))  # nothing was seen yet, and nothing happens
    observer.regather(torch.tensor([[[0]]]))
    assert observer.value() is None
    assert need.start() is not observer


def written_again(need: Need) -> Need:
    return type(need)(**vars(need))


def test_only_rotary_needs_ask_for_rotary_positions() -> None:
    for need in NEEDS:
        feed_without = Step(
            torch.zeros(1, 2, 1, DIM),
            torch.zeros(1, 1, dtype=torch.long),
            torch.zeros(1, 1, dtype=torch.bool),
            lambda: (torch.zeros(1, 2, 1, DIM), torch.zeros(1, 2, 1).long(), torch.zeros(1, 2, 1).bool()),
            1.0,
            None,
            None,
        )
        observer = need.start()
        if isinstance(need, Moments):
            with pytest.raises(AssertionError, match="hosts without rotary"):
                observer.observe(feed_without)
        else:
            observer.observe(feed_without)
            assert (observer.value() is None) == isinstance(need, ROTARY_NEEDS)


def test_signals_that_live_on_are_those_of_the_keys() -> None:
    assert [need.start().lasting for need in NEEDS] == [False, True, False, False]


# --- Queries ---


@pytest.mark.parametrize("ends", [(), (5,), (1, 2, 9), (11,)])
@pytest.mark.parametrize("last", [1, 4, 12, 50])
def test_the_last_queries_whatever_the_forwards(last: int, ends: tuple[int, ...]) -> None:
    row = random_row(12)
    observer = Queries(last).start()
    feed(observer, [row], ends)
    found = window(observer)
    count = min(last, 12)
    assert torch.equal(found.query[0], row.query[:, 12 - count :])
    assert found.positions.tolist() == [list(range(12 - count, 12))]
    assert not bool(found.padding.any()) and found.scaling == DIM**-0.5 and found.softcap is None


@pytest.mark.parametrize("ends", [(), (3,), (8, 11)])
def test_the_last_queries_of_short_rows(ends: tuple[int, ...]) -> None:
    """Rows of 12 and 2 tokens, the last 5 queries: the short row has 2 of them, behind 3 cells marked as padding."""
    rows = [random_row(12, seed=1), random_row(2, seed=2)]
    observer = Queries(5).start()
    feed(observer, rows, ends, softcap=7.0)
    found = window(observer)
    assert torch.equal(found.query[0], rows[0].query[:, 7:])
    assert found.padding.tolist() == [[False] * 5, [True, True, True, False, False]]
    assert torch.equal(found.query[1, :, 3:], rows[1].query)
    assert found.positions[1, 3:].tolist() == [0, 1] and found.softcap == 7.0


def test_the_window_averages_over_the_queries_a_row_has() -> None:
    """A row of 2 tokens in a window of 5: the mean over its 2 rows of attention, so each head's weights add up to 1."""
    rows = [random_row(12, seed=1), random_row(2, seed=2)]
    observer = Queries(5).start()
    feed(observer, rows, ())
    keys = torch.stack([torch.nn.functional.pad(row.keys, (0, 0, 12 - len(row), 0)) for row in rows])
    positions = torch.stack([torch.arange(12), torch.arange(12) - 10]).clamp(min=-1).unsqueeze(1).expand(-1, 2, -1)
    seen = attention.window_attention(window(observer), keys, positions, positions < 0)
    torch.testing.assert_close(seen.sum(-1), torch.ones(2, HEADS))
    for index, row in enumerate(rows):
        expected = naive.attention(row.query, row.keys)[:, -5:].mean(1)
        torch.testing.assert_close(seen[index, :, -len(row) :].double(), expected, rtol=1e-4, atol=1e-6)


def test_padding_after_real_queries_does_not_push_them_out() -> None:
    """A second forward in which the first row adds nothing but padding leaves its window as it was."""
    row = random_row(4)
    observer = Queries(3).start()
    padding = torch.zeros(1, 4, dtype=torch.bool)
    positions = torch.arange(4)[None]
    observer.observe(Step(row.query[None], positions, padding, lambda: (), 1.0, None, None))
    observer.observe(Step(row.query[None] * 9, positions - 9, ~padding, lambda: (), 1.0, None, None))
    assert torch.equal(window(observer).query[0], row.query[:, 1:])
    assert window(observer).positions.tolist() == [[1, 2, 3]]


def test_the_window_does_not_hold_the_prompt() -> None:
    observer = Queries(2).start()
    feed(observer, [random_row(50)], ())
    found = window(observer)
    assert found.query.untyped_storage().nbytes() == found.query.nbytes == HEADS * 2 * DIM * 4
    assert observer.nbytes == found.query.nbytes + 2 * 8 + 2


# --- Received ---


@pytest.mark.parametrize("cells", [1, 500, 10**9])
@pytest.mark.parametrize("ends", [(), (7,), (1, 2, 20)])
@pytest.mark.parametrize("heads", [2, 4])
def test_received_is_the_column_sums(
    heads: int, ends: tuple[int, ...], cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_CELLS", cells)
    rows = [random_row(n, seed=n, heads=heads) for n in (23, 9)]
    observer = Received().start()
    feed(observer, rows, ends)
    for index, row in enumerate(rows):
        expected = naive.h2o(row.query, row.keys)
        torch.testing.assert_close(total(observer)[index, :, -len(row) :].double(), expected, rtol=1e-4, atol=1e-6)
        assert bool((total(observer)[index, :, : -len(row)] == 0).all()), "padding receives nothing"
    assert total(observer).dtype == torch.float32 and observer.nbytes == 2 * KV_HEADS * 23 * 4


def test_received_under_a_softcap() -> None:
    row = random_row(9)
    observer = Received().start()
    feed(observer, [row], (4,), softcap=0.5)
    weights = naive.attention(row.query, row.keys, softcap=0.5).sum(1)
    torch.testing.assert_close(total(observer)[0].double(), weights.view(2, 2, 9).sum(1), rtol=1e-4, atol=1e-6)


def test_blocks_bound_what_scoring_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, 4 heads, 20 keys: 80 logits a query, so 250 cells let 3 queries through at a time."""
    sizes, rows = [], attention.attention_rows

    def counted(query: Tensor, *rest: object) -> Tensor:
        sizes.append(query.shape[2])
        return rows(query, *rest)

    monkeypatch.setattr(attention, "BLOCK_CELLS", 250)
    monkeypatch.setattr(attention, "attention_rows", counted)
    feed(Received().start(), [random_row(20)], ())
    assert sizes == [3] * 6 + [2]


def test_received_follows_its_keys() -> None:
    """Head 0 keeps the entries 0 and 2, head 1 only 4, which then stands second; empty slots have received nothing."""
    observer = Received().start()
    feed(observer, [random_row(5)], ())
    before = total(observer).clone()
    observer.regather(torch.tensor([[[0, 2], [-1, 4]]]))
    expected = torch.stack([before[0, 0, [0, 2]], torch.stack([torch.tensor(0.0), before[0, 1, 4]])])
    assert torch.equal(total(observer)[0], expected)
    observer.regather(torch.tensor([[[0, 1, 2], [1, 7, -1]]]))  # entries it never saw
    assert torch.equal(total(observer)[0, 0], torch.tensor([*expected[0].tolist(), 0.0]))
    assert total(observer)[0, 1].tolist() == [float(expected[1, 1]), 0, 0]


# --- Moments ---


def naive_moments(row: Row, skip: int) -> tuple[Tensor, Tensor]:
    unrotated = HalfRotary(DIM).turn(row.query[None].double(), torch.arange(len(row))[None], back=True)[0, :, skip:]
    if not unrotated.shape[1]:
        return torch.zeros(HEADS, DIM).double(), torch.zeros(HEADS, DIM, DIM).double()
    mean = unrotated.mean(1)
    spread = torch.stack([torch.cov(head.T, correction=0) for head in unrotated])
    return mean, spread.view(HEADS, DIM, DIM)


@pytest.mark.parametrize("ends", [(), (10,), (1, 2, 3, 29)])
@pytest.mark.parametrize("skip", [0, 4])
def test_moments_merged_over_forwards_are_those_of_one_pass(skip: int, ends: tuple[int, ...]) -> None:
    rows = [random_row(n, seed=n) for n in (30, 12, 3, 1)]
    observer = Moments(skip).start()
    feed(observer, rows, ends)
    found = moments(observer)
    assert found.upcoming.tolist() == [30, 12, 3, 1] and found.scaling == DIM**-0.5
    for index, row in enumerate(rows):
        mean, spread = naive_moments(row, skip)
        torch.testing.assert_close(found.mean[index].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.covariance[index].double(), spread, rtol=1e-4, atol=1e-5)


def test_moments_of_queries_far_from_zero() -> None:
    """A mean of 1,000 with a spread of 1 keeps its digits: sums of squares in float32 would lose them all."""
    draw = torch.randn(1, 40, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 1000
    rotary, positions = HalfRotary(DIM), torch.arange(40)[None]
    row = Row(rotary.turn(draw[None], positions)[0].float(), draw[:, :, :].float(), draw.float())
    observer = Moments(0).start()
    feed(observer, [row], (7, 21))
    exact = torch.cov(draw[0].T, correction=0)
    torch.testing.assert_close(moments(observer).covariance[0, 0].double(), exact, rtol=0.02, atol=0.02)


# --- Rotation ---


def test_rotation_is_the_hosts_own() -> None:
    observer = Rotation().start()
    feed(observer, [random_row(3)], ())
    assert isinstance(observer.value(), HalfRotary)


# --- rows ---


@pytest.mark.parametrize("need", [Queries(3), Received(), Moments(2)])
def test_rows_can_be_reordered_and_repeated(need: Need) -> None:
    """Rows 1, 0, 1 of what was seen, and what comes later goes on from there."""
    rows = [random_row(9, seed=1), random_row(9, seed=2)]
    shuffled, direct = need.start(), need.start()
    feed(shuffled, rows, (4,))
    shuffled.rows(torch.tensor([1, 0, 1]))
    feed(direct, [rows[1], rows[0], rows[1]], (4,))
    same(shuffled.value(), direct.value())


@pytest.mark.parametrize("need", [Queries(3), Moments(2)])
def test_regathering_keys_leaves_the_signals_of_queries_alone(need: Need) -> None:
    touched, left = need.start(), need.start()
    for observer in (touched, left):
        feed(observer, [random_row(9)], ())
    touched.regather(torch.tensor([[[0, 1], [3, 4]]]))
    same(touched.value(), left.value())


def same(a: object, b: object) -> None:
    """Equal tensors, or records whose tensors are equal."""
    assert type(a) is type(b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        torch.testing.assert_close(a, b)
        return
    for name, part in vars(a).items():
        if isinstance(part, Tensor):
            torch.testing.assert_close(part, getattr(b, name))


def test_same_sees_a_difference() -> None:
    one, other = Queries(3).start(), Queries(3).start()
    feed(one, [random_row(9, seed=1)], ())
    feed(other, [random_row(9, seed=2)], ())
    with pytest.raises(AssertionError):
        same(one.value(), other.value())
    with pytest.raises(AssertionError):
        same(torch.ones(2), torch.zeros(2))
    with pytest.raises(AssertionError):
        same(torch.ones(2), window(one))
