"""Batches: a row's plan and its following logits are those of the row alone, wherever its padding is."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from tests.adapters.common import ADA, FAMILIES, METHODS, MORE_METHODS, PAIRS, SMALL, SNAP
from tests.adapters.emulate import Twin, assert_close, columns, difference, kept_positions, ours
from tests.tiny import prompt, tiny

FIRST, SECOND = [40, 27, 33], [5, 9, 2]  # tokens of each row in two turns


def batch(lengths: list[int], side: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of these lengths, padded to the longest, and which tokens are real."""
    n = max(lengths)
    ids, real = torch.zeros(len(lengths), n, dtype=torch.long), torch.zeros(len(lengths), n, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(n - length, n) if side == "left" else slice(0, length)
        ids[row, at], real[row, at] = prompt(length, seed=seed + row)[0], 1
    return ids, real


def conversation(side: str, second: list[int] = SECOND) -> list[tuple[Tensor, Tensor]]:
    """A padded prompt, a second turn of other lengths (so that there is padding in the middle), two single tokens."""
    single = torch.ones(3, 1, dtype=torch.long)
    return [
        batch(FIRST, side, 10),
        batch(second, "right", 20),
        (prompt(1, rows=3, seed=30), single),
        (prompt(1, rows=3, seed=31), single),
    ]


class Talk:
    """Turns on one cache, with explicit positions; keeps the logits of real tokens and what was kept, turn by turn."""

    def __init__(self, model: Any, method: Any, keep: Any, **policy: Any) -> None:
        self.model, self.cache = model, fewer.Cache(model, method, keep, **policy)
        self.mask = torch.zeros(0)
        self.logits: list[list[Tensor]] = []
        self.kept: list[list[Any]] = []

    def turn(self, ids: Tensor, real: Tensor) -> None:
        self.mask = torch.cat([self.mask, real], dim=1) if self.mask.numel() else real
        places = columns(self.mask)[:, -ids.shape[1] :].clamp(min=0)
        out = self.model(ids, attention_mask=self.mask, position_ids=places, past_key_values=self.cache).logits
        self.logits.append([row[mask.bool()] for row, mask in zip(out, real, strict=True)])
        layers = ours(self.cache)
        self.kept.append([kept_positions(self.cache, i) if self.cache.layers[i].kept else [] for i in layers])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_row_in_a_batch_is_the_row_alone(family: str, method: str, side: str) -> None:
    model = tiny(family)
    if family == "gemma3_text":  # its own sliding layers count padding between real tokens as tokens of the window
        side = "left"
    turns = conversation(side, SECOND if family != "gemma3_text" else [5, 5, 5])
    together = Talk(model, MORE_METHODS[method], 0.5)
    for ids, real in turns:
        together.turn(ids, real)
    for row in range(3):
        alone = Talk(model, MORE_METHODS[method], 0.5)
        for ids, real in turns:
            there = real[row].bool()
            alone.turn(ids[row, there][None], real[row, there][None])
        for turn in range(4):
            for layer, mine in zip(together.kept[turn], alone.kept[turn], strict=True):
                assert layer[row] == mine[0]
            assert_close(together.logits[turn][row], alone.logits[turn][0])


@pytest.mark.parametrize(
    ("method", "store"),
    [(name, None) for name in MORE_METHODS] + [(name, SMALL["kivi"]) for name in METHODS],  # in-cache positions move
)
def test_rows_that_are_left_go_on_when_the_longest_has_gone(method: str, store: Any) -> None:
    model, turns = tiny("llama"), conversation("left")
    together = Talk(model, MORE_METHODS[method], 0.5, store=store)
    together.turn(*turns[0])
    left = torch.tensor([2, 1])
    together.cache.batch_select_indices(left)
    together.mask = together.mask[left]
    for ids, real in turns[1:3]:
        together.turn(ids[left], real[left])
    for at, row in enumerate(left.tolist()):
        alone = Talk(model, MORE_METHODS[method], 0.5, store=store)
        for ids, real in turns[:3]:
            there = real[row].bool()
            alone.turn(ids[row, there][None], real[row, there][None])
        for turn in (1, 2):
            assert [layer[at] for layer in together.kept[turn]] == [layer[0] for layer in alone.kept[turn]]
            assert_close(together.logits[turn][at], alone.logits[turn][0])


def test_sums_stay_with_their_keys_where_nothing_was_dropped() -> None:
    """The first turn fits the budget in every row, so the keys stay where they are; the second has to choose by sums
    that were gathered over both."""
    model = tiny("llama")
    turns = [batch(FIRST, "right", 10), batch([30, 30, 30], "right", 20)]
    together = Talk(model, MORE_METHODS["h2o"], 44)
    for ids, real in turns:
        together.turn(ids, real)
    assert together.cache.report.layers[0].kept == ((44, 44), (44, 44), (44, 44))
    for row in range(3):
        alone = Talk(model, MORE_METHODS["h2o"], 44)
        for ids, real in turns:
            there = real[row].bool()
            alone.turn(ids[row, there][None], real[row, there][None])
        assert [layer[row] for layer in together.kept[1]] == [layer[0] for layer in alone.kept[1]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("when", ["decode", "both"])
@pytest.mark.parametrize("method", ["adakv", "h2o", "streaming-llm in cache"])
def test_rows_stay_apart_while_decoding(method: str, when: Any, side: str) -> None:
    model = tiny("llama")
    steps = [
        batch(FIRST, side, 10),
        *((prompt(1, rows=3, seed=s), torch.ones(3, 1, dtype=torch.long)) for s in range(5)),
    ]
    caches = []
    for rows in (slice(None), *(slice(row, row + 1) for row in range(3))):
        cache = fewer.Cache(model, MORE_METHODS[method], 0.5, when=when, every=2)
        mask = torch.zeros(len(FIRST[rows]), 0, dtype=torch.long)
        for ids, real in steps:
            wide = real[rows].any(0) if rows != slice(None) else torch.ones(real.shape[1], dtype=torch.bool)
            mask = torch.cat([mask, real[rows][:, wide]], dim=1)
            at = columns(mask)[:, -int(wide.sum()) :].clamp(min=0)
            out = model(ids[rows][:, wide], attention_mask=mask, position_ids=at, past_key_values=cache).logits
        caches.append((cache, out))
    for row in range(3):
        assert_close(caches[0][1][row], caches[row + 1][1][0])
        for index in ours(caches[0][0]):
            assert kept_positions(caches[0][0], index)[row] == kept_positions(caches[row + 1][0], index)[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_removal_equals_masking(family: str, side: str) -> None:
    twin = Twin(family, ADA, 0.5)
    for ids, real in conversation(side):
        assert difference(*twin.step(ids, real)) <= 1e-4


def test_each_row_keeps_its_own_share() -> None:
    model = tiny("llama")
    for side in ("left", "right"):
        talk = Talk(model, SNAP, 0.5)
        talk.turn(*batch(FIRST, side, 10))
        for layer in talk.cache.report.layers:
            assert layer.seen == tuple(FIRST)
            assert layer.asked == (20, 14, 17)
            assert layer.kept == ((20, 20), (14, 14), (17, 17))


def test_a_count_keeps_short_rows_whole() -> None:
    talk = Talk(tiny("llama"), SNAP, 30)
    talk.turn(*batch(FIRST, "left", 10))
    assert talk.cache.report.layers[0].kept == ((30, 30), (27, 27), (30, 30))
    assert talk.kept[0][0][1] == [list(range(27))] * 2


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_generate_with_left_padding_gives_each_row_its_own_answer(family: str, method: str) -> None:
    model = tiny(family)
    ids, real = batch(FIRST, "left", 10)
    how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with fewer.compress(model, MORE_METHODS[method], keep=0.5):
        together = model.generate(ids, attention_mask=real, **how)
        for row, length in enumerate(FIRST):
            alone = model.generate(ids[row : row + 1, -length:], **how)
            assert torch.equal(together.sequences[row, ids.shape[1] :], alone.sequences[0, length:])
            for got, want in zip(together.logits, alone.logits, strict=True):
                assert_close(got[row], want[0])


@pytest.mark.parametrize("method", METHODS)
def test_generate_in_chunks_with_left_padding(method: str) -> None:
    """A chunk may hold nothing but padding of a row."""
    model = tiny("llama")
    ids, real = batch([40, 12, 33], "left", 10)
    how = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 8}
    with fewer.compress(model, METHODS[method], keep=20) as run:
        together = model.generate(ids, attention_mask=real, **how)
        assert run.report.layers[0].seen == (43, 15, 36)
        assert torch.equal(together[0, 40:], model.generate(ids[:1], **how)[0, 40:])


def test_the_same_row_twice_is_the_same_row() -> None:
    model = tiny("llama")
    ids = prompt(40).repeat(2, 1)
    cache = fewer.Cache(model, ADA, 0.25)
    out = model(ids, past_key_values=cache).logits
    following = model(prompt(3, seed=1).repeat(2, 1), past_key_values=cache).logits
    assert torch.equal(out[0], out[1])
    assert_close(following[0], following[1], within=1e-6)
    kept = kept_positions(cache, 0)
    assert kept[0] == kept[1]
