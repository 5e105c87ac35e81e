"""A prompt of which only some tokens attend: gathering them is what masking the others would be."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fewer
from fewer.adapters import hf_layer
from fewer.methods.any.uniform import Uniform
from fewer.methods.kv.zipvl import ZipVL
from fewer.types import FewerError, FewerWarning, Plan, Tokens, UnsupportedModel
from tests.adapters.common import FAMILIES, cached, turns, untouched
from tests.adapters.emulate import assert_close
from tests.adapters.test_batches import batch
from tests.tiny import prompt, tiny


def chosen(positions: Tensor, real: Tensor) -> Tensor:
    """Of head i every token whose position is a multiple of i + 2, and the last: `(b, h, n)`."""
    every = torch.arange(positions.shape[1]).view(1, -1, 1) + 2
    return (positions >= 0) & ((positions % every == 0) | (positions == real.view(-1, 1, 1) - 1))


@dataclass(frozen=True)
class Some(Uniform):
    """Uniform, with a prompt read by some tokens of each head, which are not the same number at all of them."""

    everyone: bool = False

    def among(self, tokens: Tokens, scores: Tensor) -> Plan:
        if self.everyone:
            return Plan.keep(~tokens.padding)
        return Plan.keep(chosen(tokens.positions, tokens.seen) & ~tokens.padding)


def masked(layer: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """The same attention over all tokens, with those hidden that take no part."""
    (b, heads, q, _), h = query.shape, key.shape[1]
    positions, _ = layer._tail()
    part = chosen(positions.unsqueeze(1).expand(b, h, q), torch.tensor(layer.real))
    part = part.repeat_interleave(heads // h, 1)
    key, value = (x.repeat_interleave(heads // h, 1) for x in (key, value))
    seen = part.unsqueeze(2) & part.unsqueeze(3) & torch.ones(q, q, dtype=torch.bool).tril()
    weights = (query @ key.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights.nan_to_num() @ value).transpose(1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_gathering_is_masking(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    with fewer.Cache(model, Some(), 0.5) as cache:
        found = cached(model, cache, *turns())
    with fewer.Cache(model, "uniform", 0.5) as cache:
        full = cached(model, cache, *turns())
    monkeypatch.setattr(hf_layer, "attend_among", masked)
    with fewer.Cache(model, Some(), 0.5) as cache:
        expected = cached(model, cache, *turns())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], full[0], atol=1e-2), "something was left out"


@pytest.mark.parametrize("family", FAMILIES)
def test_where_all_take_part_it_is_full_attention(family: str) -> None:
    model = tiny(family)
    with fewer.Cache(model, Some(everyone=True), 0.5) as cache:
        found = cached(model, cache, *turns())
    with fewer.Cache(model, "uniform", 0.5) as cache:
        for ours, theirs in zip(found, cached(model, cache, *turns()), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [Some(), ZipVL(), ZipVL(variant="drop")], ids=["some", "zipvl", "zipvl drop"])
def test_rows_are_the_same_alone_and_in_a_batch(method: Any, side: str) -> None:
    model, lengths = tiny("llama"), [40, 12, 33]
    keep = 1.0 if getattr(method, "whole", False) else 0.5
    ids, real = batch(lengths, side, 10)
    warnings.filterwarnings("ignore", "layers keep fewer tokens than allowed", FewerWarning)
    with fewer.Cache(model, method, keep) as cache:
        together = model(ids, attention_mask=real, past_key_values=cache).logits
    for row, n in enumerate(lengths):
        there = real[row].bool()
        with fewer.Cache(model, method, keep) as cache:
            alone = model(ids[row : row + 1, there], past_key_values=cache).logits
        torch.testing.assert_close(together[row, there], alone[0], atol=1e-4, rtol=1e-4)
        assert alone.shape[1] == n


def test_what_comes_later_attends_to_everything_that_is_held() -> None:
    """A second turn is read densely: all at once is the same as token by token."""
    model, (first, second, *_) = tiny("llama"), turns()
    with fewer.Cache(model, ZipVL(variant="drop", tau=0.5), 0.99) as cache:
        with pytest.warns(FewerWarning, match="tau"):
            model(first, past_key_values=cache)
        kept = cache.report.kept
        assert kept < 1
        cache.freeze()
        copy = cache.fork()
        together = model(second, past_key_values=cache).logits
        one_by_one = cached(model, copy, *second.split(1, dim=1))
    torch.testing.assert_close(together, torch.cat(one_by_one, 1), atol=1e-4, rtol=1e-4)


def test_nothing_is_skipped_where_everything_is_kept_as_it_is() -> None:
    model = tiny("llama")
    with fewer.Cache(model, ZipVL(variant="drop"), 1.0) as cache:
        assert torch.equal(model(prompt(40), past_key_values=cache).logits, model(prompt(40)).logits)


def test_zipvl_reads_a_prompt_among_its_important_tokens() -> None:
    """With tau 1 all of them; with less the logits change, unless the prefill is dense."""
    model, ids = tiny("llama"), prompt(40)
    plain = model(ids).logits
    for method, same in ((ZipVL(tau=1.0), True), (ZipVL(tau=0.5), False), (ZipVL(tau=0.5, dense=True), True)):
        with fewer.Cache(model, method, 1.0) as cache:
            logits = model(ids, past_key_values=cache).logits
        assert bool(logits.isfinite().all()) and torch.allclose(logits, plain, atol=1e-3) is same, method


@pytest.mark.filterwarnings("ignore:layers keep fewer tokens than allowed")
@pytest.mark.parametrize("variant", ["quantise", "drop"])
def test_a_first_chunk_in_which_a_row_is_all_padding(variant: Any) -> None:
    """Nobody of that row takes part, and the other row reads its chunk as it does alone."""
    model, method = tiny("llama"), ZipVL(variant=variant)
    ids, real = prompt(48, rows=2), torch.ones(2, 48, dtype=torch.long)
    real[1, :20] = 0
    keep, logits = 1.0 if variant == "quantise" else 0.99, []
    for rows in (slice(None), slice(1)):
        with fewer.Cache(model, method, keep) as cache:
            for at in (slice(0, 16), slice(16, 32), slice(32, 48)):
                given = {
                    "attention_mask": real[rows, : at.stop],
                    "position_ids": (real.cumsum(1) - 1).clamp(0)[rows, at],
                }
                out = model(ids[rows, at], past_key_values=cache, **given).logits
            logits.append(out[:1])
            counts = cache.report.layers[0].kept
        if len(out) == 2:
            assert bool(out.isfinite().all()) and max(counts[1]) <= 28
    assert_close(*logits)


def test_bad_use_is_refused() -> None:
    model = tiny("llama")
    with fewer.Cache(model, "full", 1.0) as cache:
        model(prompt(40), past_key_values=cache)
        with pytest.raises(FewerError, match=r"Some skips parts of a prompt while it is read, so it cannot be tried"):
            cache.under(Some(), 0.5)
    capped = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gemma2", vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, layer_types=["full_attention"] * 2,
        ),
        attn_implementation="eager",
    ).eval()  # fmt: skip
    with (
        untouched(capped),
        fewer.Cache(capped, Some(), 0.5) as cache,
        pytest.raises(UnsupportedModel, match=r"layer 0 caps its logits, and Some attends to a prompt without that"),
    ):
        capped(prompt(40), past_key_values=cache)
