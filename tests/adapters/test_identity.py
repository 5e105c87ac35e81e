"""Keeping everything is the host's own cache, bit for bit; and the host's back ends and dtypes agree when it is not."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fewer
from fewer.types import FewerWarning
from tests.adapters.common import ADA, FAMILIES, METHODS, SNAP, cached, turns
from tests.adapters.emulate import Twin, assert_close, difference, kept_positions, ours
from tests.tiny import prompt, tiny

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("method", "keep"), [(SNAP, 1.0), (METHODS["h2o"], 1), ("full", 0.25)])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_the_host_bit_for_bit(family: str, method: Any, keep: Any, attn: str) -> None:
    model = tiny(family, attn=attn)
    want = cached(model, DynamicCache(config=model.config), *turns())
    with fewer.Cache(model, method, keep) as cache:
        got = cached(model, cache, *turns())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(cache.report.layers[i].state == "whole" for i in ours(cache))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_with_padding_and_generate(family: str, attn: str) -> None:
    model = tiny(family, attn=attn)
    ids, real = prompt(30, rows=2), torch.ones(2, 30, dtype=torch.long)
    real[1, :11] = 0
    how = {**GREEDY, "attention_mask": real, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **how)
    for method in ("full", SNAP):
        with fewer.compress(model, method, keep=1.0):
            got = model.generate(ids, **how)
        assert torch.equal(got.sequences, want.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


def test_eager_attention_weights_are_still_given_where_nothing_was_dropped() -> None:
    model = tiny("llama", attn="eager")
    want = model(prompt(30), output_attentions=True).attentions
    with fewer.compress(model, "knorm", keep=0.5):  # the prompt's own forward attends to everything
        got = model(prompt(30), output_attentions=True).attentions
    assert len(want) == 3
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_attention_weights_that_are_not_given_are_said() -> None:
    model = tiny("llama", attn="eager", eos_token_id=None)
    how = {"max_new_tokens": 3, "do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    with fewer.compress(model, "knorm", keep=0.5) as run, pytest.warns(FewerWarning, match="output_attentions"):
        prefill, *steps = model.generate(prompt(30), **how).attentions
    assert len(prefill) == 3 and steps == [(), ()]
    assert any("output_attentions" in note for note in run.report.notes)


@pytest.mark.parametrize("method", ["snapkv", "adakv", "expected-attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_hosts_agree(family: str, method: str) -> None:
    logits, kept = [], []
    for attn in ("sdpa", "eager"):
        model = tiny(family, attn=attn)
        cache = fewer.Cache(model, METHODS[method], 0.5)
        logits.append(cached(model, cache, *turns()))
        kept.append([kept_positions(cache, index) for index in ours(cache)])
    assert kept[0] == kept[1]
    for a, b in zip(*logits, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_keeps_bf16_and_is_the_host_at_keep_one(family: str) -> None:
    model = tiny(family, dtype=torch.bfloat16)
    want = cached(model, DynamicCache(config=model.config), *turns())
    with fewer.Cache(model, SNAP, 1.0) as cache:
        assert all(torch.equal(a, b) for a, b in zip(cached(model, cache, *turns()), want, strict=True))


@pytest.mark.parametrize("method", ["adakv", "h2o", "expected-attention", "streaming-llm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_removal_equals_masking(family: str, method: str) -> None:
    twin = Twin(family, METHODS[method], 0.5, dtype=torch.bfloat16)
    for ids in turns():
        got, want = twin.step(ids)
        assert got.dtype == torch.bfloat16
        assert difference(got.float(), want.float()) <= 0.06  # eight bits of mantissa, through three or four layers
    kept = twin.cache.layers[ours(twin.cache)[0]].kept
    assert kept.keys.dtype == kept.values.dtype == torch.bfloat16


def test_bf16_bytes_are_half() -> None:
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        with fewer.Cache(model, ADA, 0.25) as cache:
            cached(model, cache, prompt(80))
            sizes.append(cache.report.bytes_kept - cache.report.metadata)
    assert sizes[0] == 2 * sizes[1]
