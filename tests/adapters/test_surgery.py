"""What generation does to a cache between forwards: crop, repeat, select, reorder, reset; what follows is right."""

from typing import Any

import pytest
import torch

import fewer
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.streaming_llm import StreamingLLM
from tests.adapters.common import ADA, METHODS, MORE_METHODS, SNAP, cached, held, turns
from tests.adapters.emulate import Twin, assert_close, difference, kept_positions, ours
from tests.tiny import prompt, tiny

PLAIN = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox"]
"""Families without sliding-window layers, which transformers itself does not crop once their window is full."""


def crop(twin: Twin, gone: int, how: str) -> None:
    """Crop our cache as it is asked to be cropped, and the plain one by hand: releases differ in what they take."""
    length = twin.cache.get_seq_length()
    for layer in twin.cache.layers:
        layer.crop(-gone if how == "negative" else length - gone)
    for layer in twin.full.layers:
        layer.keys, layer.values = layer.keys[:, :, : length - gone], layer.values[:, :, : length - gone]
    assert twin.seen is not None
    twin.seen = twin.seen[:, : length - gone]
    assert twin.cache.get_seq_length() == length - gone
    assert twin.cache.report.layers[0].seen == tuple([length - gone] * twin.seen.shape[0])
    assert held(twin.cache) == twin.cache.report.bytes_kept


def follow(twin: Twin) -> float:
    return max(difference(*twin.step(prompt(n, rows=len(twin.seen), seed=9 + n))) for n in (3, 1, 1, 6, 1))


@pytest.mark.parametrize("how", ["negative", "positive"])
@pytest.mark.parametrize("gone", [1, 4, 11, 33], ids=["tail", "whole tail", "packed", "whole window"])
@pytest.mark.parametrize("method", [SNAP, ADA, H2O(), StreamingLLM()], ids=["snapkv", "adakv", "h2o", "streaming-llm"])
def test_crop(method: Any, gone: int, how: str) -> None:
    twin = Twin("llama", method, 0.5, sinks=4 if method == StreamingLLM() else None)
    for n in (40, 1, 1, 1, 1):
        twin.step(prompt(n, seed=n))
    crop(twin, gone, how)
    assert follow(twin) <= 1e-4


@pytest.mark.parametrize("gone", [3, 11])
@pytest.mark.parametrize("family", PLAIN)
def test_crop_in_every_family(family: str, gone: int) -> None:
    twin = Twin(family, ADA, 0.5)
    for n in (40, 1, 1, 1, 1):
        twin.step(prompt(n, seed=n))
    crop(twin, gone, "negative")
    assert follow(twin) <= 1e-4


def test_crop_before_the_window_is_full() -> None:
    twin = Twin("gemma3_text", METHODS["knorm"], 0.5)
    twin.step(prompt(10)), twin.step(prompt(1, seed=1))
    for layer in (*twin.cache.layers, *twin.full.layers):
        layer.crop(-4)
    twin.seen = twin.seen[:, :7]
    assert follow(twin) <= 1e-4


@pytest.mark.parametrize("method", [SNAP, ADA, H2O()], ids=["snapkv", "adakv", "h2o"])
@pytest.mark.parametrize("gone", [2, 12])
def test_crop_while_decoding_is_compressed(method: Any, gone: int) -> None:
    """The scores gathered so far move with the keys that a crop leaves."""
    twin = Twin("llama", method, 20, when="both", every=3)
    for n in (40, 1, 1, 1, 1, 1):
        twin.step(prompt(n, seed=n))
    crop(twin, gone, "negative")
    assert follow(twin) <= 1e-4
    assert twin.cache.report.layers[0].kept[0][0] + twin.cache.report.layers[0].kept[0][1] <= 2 * 22


@pytest.mark.parametrize("gone", [3, 12])
def test_crop_of_several_rows(gone: int) -> None:
    twin = Twin("llama", ADA, 0.5)
    for n in (40, 1, 1, 1):
        twin.step(prompt(n, rows=3, seed=n))
    crop(twin, gone, "negative")
    assert follow(twin) <= 1e-4


def test_what_is_cropped_is_what_came_last() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, SNAP, 0.5)
    cached(model, cache, prompt(40), prompt(1))
    before = kept_positions(cache, 0)
    cache.crop(-6)
    assert kept_positions(cache, 0) == [[[p for p in head if p < 35] for head in row] for row in before]


@pytest.mark.parametrize(("method", "keep"), [(SNAP, 0.5), (SNAP, 1.0), (StreamingLLM(), 0.5)])
def test_nothing_and_everything_can_be_cropped(method: Any, keep: float) -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, method, keep)
    cached(model, cache, *turns())
    report = cache.report
    cache.crop(0)
    assert cache.report.layers == report.layers
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    fresh = fewer.Cache(model, method, keep)
    for got, want in zip(cached(model, cache, *turns()), cached(model, fresh, *turns()), strict=True):
        assert_close(got, want, within=1e-6)


def test_cropping_a_whole_cache_is_a_shorter_prompt() -> None:
    model = tiny("llama")
    long, short = fewer.Cache(model, SNAP, 1.0), fewer.Cache(model, SNAP, 1.0)
    cached(model, long, prompt(40))
    cached(model, short, prompt(40)[:, :33])
    long.crop(-7)
    for got, want in zip(cached(model, long, *turns()[1:]), cached(model, short, *turns()[1:]), strict=True):
        assert_close(got, want, within=1e-6)


def test_a_padded_batch_crops_its_tail_and_says_what_it_cannot() -> None:
    model = tiny("llama")
    real = torch.ones(2, 30, dtype=torch.long)
    real[0, :7] = 0
    cache = fewer.Cache(model, SNAP, 0.5)
    model(prompt(30, rows=2), attention_mask=real, past_key_values=cache)
    model(prompt(1, rows=2), attention_mask=torch.cat([real, real[:, -1:]], 1), past_key_values=cache)
    with pytest.raises(fewer.FewerError, match="only the 1 tokens"):
        cache.crop(-3)
    assert cache.report.layers[0].seen == (24, 31)
    cache.crop(-1)
    assert cache.report.layers[0].seen == (23, 30)
    cache.freeze()
    turn = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    model(prompt(5, rows=2), attention_mask=torch.cat([real, turn], 1), past_key_values=cache)
    cache.crop(-2)
    assert cache.report.layers[0].seen == (24, 33)
    assert held(cache) == cache.report.bytes_kept


@pytest.mark.parametrize("when", ["prefill", "both"])
@pytest.mark.parametrize("method", MORE_METHODS)
def test_rows_reordered_repeated_and_selected(method: str, when: Any) -> None:
    """Rows go where they are sent with all that was gathered for them."""
    twin = Twin("llama", MORE_METHODS[method], 0.5, sinks=4 if "cache" in method else None, when=when, every=2)
    twin.step(prompt(40, rows=3)), twin.step(prompt(1, rows=3, seed=1))
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([5, 0, 2]), [5, 0, 2]),
    ):
        for cache in (twin.cache, twin.full):
            getattr(cache, name)(argument)
        assert twin.seen is not None
        twin.seen = twin.seen[rows]
        assert held(twin.cache) == twin.cache.report.bytes_kept
        for n in (1, 1, 4):
            assert difference(*twin.step(prompt(n, rows=len(rows), seed=n))) <= 1e-4


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox", "phi3"])
def test_rows_reordered_in_other_families(family: str) -> None:
    twin = Twin(family, ADA, 0.5)
    twin.step(prompt(40, rows=3))
    for cache in (twin.cache, twin.full):
        cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert follow(twin) <= 1e-4


def test_rows_of_an_empty_cache_can_be_asked_for() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, SNAP, 0.5)
    cache.reorder_cache(torch.tensor([0])), cache.batch_repeat_interleave(2), cache.crop(-3)
    assert cache.get_seq_length() == 0
    assert cached(model, cache, prompt(30))[0].shape[0] == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_reset_is_a_fresh_cache(family: str) -> None:
    model = tiny(family)
    used, fresh = (fewer.Cache(model, ADA, 0.5, when="both", every=2) for _ in range(2))
    cached(model, used, *turns(50))
    used.reset()
    assert used.get_seq_length() == 0
    if family == "llama":
        assert held(used) == used.report.bytes_kept == 0
        for got, want in zip(cached(model, used, *turns()), cached(model, fresh, *turns()), strict=True):
            assert torch.equal(got, want)
        assert [kept_positions(used, i) for i in ours(used)] == [kept_positions(fresh, i) for i in ours(fresh)]
