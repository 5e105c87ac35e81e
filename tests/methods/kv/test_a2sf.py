"""A2SF: attention received, with a forgetting factor."""

import pytest
import torch
from torch import Tensor

import fewer
from fewer.methods.kv.a2sf import A2SF
from fewer.methods.kv.h2o import H2O
from fewer.score import attention
from fewer.signals import Received, Step
from fewer.types import Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Cache,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)
from tests.tiny import prompt, tiny


def reference(query: Tensor, keys: Tensor, factor: float, unseen: range = range(0)) -> Tensor:
    """Column sums of the attention matrix, row q of n times factor^(n - 1 - q), summed over the group's heads; without
    the rows that are unseen."""
    h, n, _ = keys.shape
    groups, weights = query.shape[0] // h, naive.attention(query, keys)
    out = torch.zeros(h, n, dtype=torch.float64)
    for head in range(query.shape[0]):
        for q in range(n):
            out[head // groups] += weights[head, q] * factor ** (n - 1 - q) * (q not in unseen)
    return out


def test_worked_example() -> None:
    """One channel, every query 1, keys ln 1, 3, 1, 1: attention is in proportion to 1, 3, 1, 1; the factor is 1/2.

    Rows: (1), (1, 3) / 4, (1, 3, 1) / 5, (1, 3, 1, 1) / 6, counted 1/8, 1/4, 1/2 and 1 times. Columns:
    1/8 + 1/16 + 1/10 + 1/6 = 0.454, 3/16 + 3/10 + 3/6 = 0.988, 1/10 + 1/6 = 0.267, 1/6 = 0.167. Of two kept with one
    recent: 3, and the heaviest other, 1. Without forgetting, token 0 would be at 1.617 and come second of three.
    """
    keys = torch.tensor([[[1.0], [3], [1], [1]]]).log()
    method = A2SF(0.5, recent=1)
    tokens = place(method, Row(torch.ones(1, 4, 1), keys, keys))
    expected = torch.tensor([[[1 / 8 + 1 / 16 + 1 / 10 + 1 / 6, 3 / 16 + 3 / 10 + 3 / 6, 1 / 10 + 1 / 6, 1 / 6]]])
    torch.testing.assert_close(method.score(tokens), expected)
    assert kept(tokens, decide(method, 2, tokens)) == [[1, 3]]


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, factor: float) -> None:
    row, count, method = random_row(n), -(-n // 2), A2SF(factor, recent=3)
    tokens = place(method, row)
    expected = reference(row.query, row.keys, factor)
    agree(method.score(tokens)[0], expected)
    recent = min(3, count)
    assert kept(tokens, decide(method, 0.5, tokens)) == [
        [*naive.best(head[: n - recent], count - recent), *range(n - recent, n)] for head in expected
    ]


@pytest.mark.parametrize("keep", [32, 40, 63])
@pytest.mark.parametrize("n", [33, 130])
def test_a_factor_of_one_is_h2o(n: int, keep: int) -> None:
    """Bit for bit, where H2O's share of recent tokens comes to the same 16."""
    h2o, a2sf = H2O(recent=16 / min(n, keep) + 1e-9), A2SF(1.0)
    assert h2o.needs == a2sf.needs
    rows = [random_row(n), random_row(20)]
    one, other = place(h2o, rows), place(a2sf, rows)
    assert torch.equal(h2o.score(one), a2sf.score(other))
    assert torch.equal(decide(h2o, keep, one).survivors[0], decide(a2sf, keep, other).survivors[0])


def test_a_factor_of_one_is_h2o_token_after_token() -> None:
    row, one, other = random_row(50), Cache(H2O(), 32), Cache(A2SF(1.0), 32)
    for start, end in [(0, 40), *((i, i + 1) for i in range(40, 50))]:
        one.forward(row.part(start, end))
        other.forward(row.part(start, end))
    assert torch.equal(one.positions, other.positions)


def test_a_factor_of_zero_is_the_last_row() -> None:
    row = random_row(30)
    last = naive.attention(row.query, row.keys)[:, -1].view(2, 2, 30).sum(1)
    for chunks in ((), (29,), (4, 20)):
        agree(A2SF(0.0).score(place(A2SF(0.0), row, chunks=chunks))[0], last)


def test_padding_and_chunks_change_nothing() -> None:
    same_alone_and_padded(A2SF(0.9, 4), 0.3)
    same_alone_and_padded(A2SF(0.9, 4), 0.3, lengths=(10, 20), filler=torch.nan)
    same_in_chunks(A2SF(0.9, 4), 0.3)


@pytest.mark.parametrize("chunks", [(), (5,), (12,), (3, 4, 17)])
def test_a_row_ages_by_its_own_queries_alone(chunks: tuple[int, ...]) -> None:
    """A row of 8 behind 12 cells of padding: a forward that brings it nothing ages it by nothing."""
    rows = [random_row(20), random_row(8, seed=1)]
    method = A2SF(0.5)
    batch = place(method, rows, chunks=chunks)
    agree(method.score(batch)[1, :, 12:], reference(rows[1].query, rows[1].keys, 0.5))


@pytest.mark.parametrize("chunks", [(20, 50), (1, 59), (20, 21)])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 1.0])
def test_sums_age_by_queries_that_nobody_was_shown(factor: float, chunks: tuple[int, int]) -> None:
    """A prompt, decoding steps that are not observed, and a second turn; a short row begins among the steps, or in the
    turn after them. With a factor of 1 the sums are H2O's."""
    rows, method = [random_row(60), random_row(25, seed=1), random_row(1, seed=2)], A2SF(factor)
    tokens = place(method, rows, chunks=chunks, unseen=(1,))
    for index, row in enumerate(rows):
        missing = 60 - len(row)
        unseen = range(chunks[0] - missing, chunks[1] - missing)
        expected = reference(row.query, row.keys, factor, unseen)
        agree(method.score(tokens)[index, :, missing:], expected)
    h2o = place(H2O(), rows, chunks=chunks, unseen=(1,))
    assert factor != 1 or torch.equal(method.score(tokens), H2O().score(h2o))


def test_rows_take_along_how_far_they_were_seen() -> None:
    """Rows 1, 0, 1 of what was seen after 20 tokens, 30 that nobody was shown, and 10 more."""
    rows, observer = [random_row(60), random_row(60, seed=1)], Received(0.9).start()
    order = [1, 0, 1]

    def show(rows: list[Row], start: int, end: int) -> None:
        keys, places = torch.stack([row.keys[:, :end] for row in rows]), torch.arange(end).expand(len(rows), end)
        wide = places.unsqueeze(1).expand(-1, 2, -1)
        query = torch.stack([row.query[:, start:end] for row in rows])
        observer.observe(
            Step(query, places[:, start:], places[:, start:] < 0, lambda: (keys, wide, wide < 0), 8**-0.5, None, None)
        )

    show(rows, 0, 20)
    observer.rows(torch.tensor(order))
    show([rows[index] for index in order], 50, 60)
    for place_in_batch, index in enumerate(order):
        expected = reference(rows[index].query, rows[index].keys, 0.9, range(20, 50))
        agree(observer.value()[place_in_batch], expected)  # type: ignore[index]


@torch.no_grad()
def test_a_second_turn_finds_the_prompt_as_old_as_it_is() -> None:
    """20 tokens, 30 of decoding, which are not observed, and 10 more, against the model's own attention."""
    found: list[Tensor] = []

    class Spy(A2SF):
        def score(self, tokens: Tokens) -> Tensor:
            found.append(super().score(tokens))
            return found[-1]

    model, ids = tiny("llama", num_hidden_layers=1, attn="eager"), prompt(60)
    weights = model(ids, output_attentions=True).attentions[0][0].double()  # (heads, n, n)
    with fewer.Cache(model, Spy(), 1000) as cache:
        for start, end in [(0, 20), *((at, at + 1) for at in range(20, 50)), (50, 60)]:
            model(ids[:, start:end], past_key_values=cache)
    age = torch.arange(59, -1, -1)
    counts = 0.95**age * ((age < 10) | (age >= 40))
    expected = (weights * counts[:, None]).sum(1)
    agree(found[-1][0], expected.view(2, -1, 60).sum(1))


@pytest.mark.parametrize("cells", [1, 500])
def test_blocks_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_CELLS", cells)
    row = random_row(23)
    agree(A2SF(0.7).score(place(A2SF(0.7), row, chunks=(9,)))[0], reference(row.query, row.keys, 0.7))


def test_evicted_tokens_are_forgotten_and_kept_ones_age() -> None:
    """Prefill 12, keep 6, then 3 more: old sums times the factor, plus the new query's softmax over what is held."""
    factor, row, cache = 0.8, random_row(15, heads=2), Cache(A2SF(0.8, recent=3), 6)
    cache.forward(row.part(0, 12))
    columns = reference(row.query[:, :12], row.keys[:, :12], factor)
    sums = [{p: float(columns[h, p]) for p in cache.positions[h].tolist()} for h in range(2)]
    for new in range(12, 15):
        for h in range(2):
            held = [*sums[h], new]
            weights = torch.softmax(row.keys[h, held].double() @ row.query[h, new].double() / 8**0.5, 0)
            sums[h] = {p: factor * sums[h].get(p, 0.0) + float(w) for p, w in zip(held, weights, strict=True)}
            heavy = sorted(held[:-3], key=sums[h].__getitem__)[-3:]
            sums[h] = {p: sums[h][p] for p in sorted([*heavy, *held[-3:]])}
        cache.forward(row.part(new, new + 1))
    assert cache.positions.tolist() == [list(head) for head in sums]
    (observer,) = cache.observers.values()
    agree(observer.value()[0], torch.tensor([list(head.values()) for head in sums], dtype=torch.float64))


def test_a_budget_below_the_recent_tokens_keeps_the_latest_of_them() -> None:
    tokens = place(A2SF(), random_row(30))
    assert kept(tokens, decide(A2SF(), 5, tokens)) == [[25, 26, 27, 28, 29]] * 2


def test_received_is_as_it_was_unless_it_forgets() -> None:
    """The need without a factor is the need of H2O, and another one is another need."""
    assert Received() == Received(1.0) == Received(decay=1.0) and hash(Received()) == hash(Received(1.0))
    assert Received(0.95) != Received() and A2SF().needs == {Received(0.95)}


def tokens_of(method: A2SF, seed: int, n: int) -> Tokens:
    row = random_row(n, seed=seed)
    return place(method, Row(row.query * 3, row.keys, row.values))


@pytest.mark.parametrize(
    ("method", "n", "seed", "keep", "theirs"),
    [
        (
            A2SF(0.95, 8),
            300,
            3,
            24,
            [
                [6, 25, 36, 60, 74, 83, 98, 117, 121, 186, 217, 225, 243, 246, 272, 280],
                [1, 48, 58, 108, 109, 125, 127, 145, 176, 209, 213, 225, 238, 251, 269, 290],
            ],
        ),
        (
            A2SF(0.8, 4),
            60,
            5,
            20,
            [
                [0, 2, 3, 5, 13, 15, 19, 26, 27, 32, 33, 40, 46, 47, 48, 51],
                [0, 3, 5, 7, 13, 14, 15, 21, 23, 26, 34, 41, 42, 45, 46, 50],
            ],
        ),
    ],
    ids=["300", "60"],
)
def test_the_authors_code_keeps_the_same(method: A2SF, n: int, seed: int, keep: int, theirs: list[list[int]]) -> None:
    """Golden: compressed_attention with A2SFPolicy (Dirac-Notation/A2SF 00a617f, utils_real_drop), two heads a group.

    On random_row(n, seed) with queries times 3; the indices before the recent ones.
    """
    tokens = tokens_of(method, seed, n)
    ours = kept(tokens, decide(method, keep, tokens))
    assert ours == [[*head, *range(n - method.recent, n)] for head in theirs]
