"""Layers held two by two: what the model reads is the pair, what the process holds is one of it, whatever rows do."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fewer
from fewer.methods.kv.minicache import MiniCache
from fewer.pairs import Half
from fewer.types import BudgetError, FewerError, FewerWarning
from tests.adapters.common import cached, held, newborn, refused, tensors_in, turns
from tests.adapters.emulate import assert_close, columns
from tests.methods.kv.test_minicache import reference
from tests.tiny import prompt, tiny

MINI = MiniCache()
WIDE = MiniCache(gamma=0.3)
EXACT = MiniCache(gamma=2.0)
"""Every token of every pair stays whole: all of the machinery, and no loss."""

DEEP = {"num_hidden_layers": 5}
"""Layers 2 and 3 are a pair; the last one has no other."""


def deep(family: str = "llama", **changes: Any) -> Any:
    if family == "gemma3_text":
        kinds = ["sliding_attention", *["full_attention"] * 4]
        return tiny(family, layer_types=kinds, **DEEP, **changes)
    return tiny(family, **DEEP, **changes)


def filled(model: Any, method: Any = MINI, rows: int = 1, **how: Any) -> fewer.Cache:
    cache = fewer.Cache(model, method, **how)
    model(prompt(40, rows=rows), past_key_values=cache)
    return cache


def halves(cache: Any) -> dict[int, tuple[Any, ...]]:
    return {layer.index: layer.coded for layer in cache.shared.members if layer.coded}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_the_model_reads_what_the_pair_gives(family: str) -> None:
    """Against a plain cache whose upper layers were replaced by what the algorithm's text makes of them."""
    model = deep(family)
    cache, full = filled(model, WIDE), DynamicCache(config=model.config)
    model(prompt(40), past_key_values=full)
    lower, upper = [layer.index for layer in cache.shared.members[2:4]]
    assert list(halves(cache)) == [lower, upper]
    for name in ("keys", "values"):
        one, two = (getattr(full.layers[index], name) for index in (lower, upper))
        for head in range(one.shape[1]):
            made = reference(one[0, head], two[0, head], WIDE.interpolation, WIDE.gamma)
            one[0, head], two[0, head] = (x.to(one.dtype) for x in made)
    for got, want in zip(cached(model, cache, *turns()[2:]), cached(model, full, *turns()[2:]), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "qwen3"])
def test_pairs_that_lose_nothing_change_nothing(family: str) -> None:
    model = deep(family)
    cache, full = fewer.Cache(model, EXACT), DynamicCache(config=model.config)
    for got, want in zip(cached(model, cache, *turns()), cached(model, full, *turns()), strict=True):
        assert_close(got, want, within=1e-5)


@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_the_process_holds_each_pair_once(when: Any) -> None:
    model = deep()
    model(prompt(40))
    said = (*turns(), *turns(30))
    with newborn(model) as alive, fewer.Cache(model, MINI, when=when, every=2) as cache:
        for ids in said:
            cached(model, cache, ids)
            assert held(cache) == cache.report.bytes_kept == sum(alive().values())
        assert cache.shared.held <= cache.shared.peak


def test_a_pair_takes_little_more_than_half() -> None:
    model = deep()
    report = filled(model).report
    for layer in report.layers[2:4]:
        assert layer.state == "compressed" and layer.kept == ((40, 40),)
        assert 0.5 * layer.bytes_full < layer.bytes_kept < 0.75 * layer.bytes_full
    assert all(layer.bytes_kept == layer.bytes_full for layer in (*report.layers[:2], report.layers[4]))
    assert report.kept == 1.0


def test_nothing_held_is_a_view_of_something_larger() -> None:
    model = deep()
    cache = filled(model, rows=2)
    cache.reorder_cache(torch.tensor([1, 1]))
    for tensor in tensors_in(cache):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


SURGERIES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2])), [2]),
    "double": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
}


@pytest.mark.parametrize("surgery", SURGERIES)
def test_rows_move_with_their_pairs(surgery: str) -> None:
    model = deep()
    cut, rows = SURGERIES[surgery]
    cache = filled(model, rows=3)
    want = cached(model, cache.fork(), *(ids.expand(3, -1) for ids in turns()[1:]))
    cut(cache)
    assert held(cache) == cache.report.bytes_kept, "each pair is still one"
    cache.freeze()
    got = cached(model, cache, *(ids.expand(len(rows), -1) for ids in turns()[1:]))
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs[rows], within=1e-5)


def test_beams() -> None:
    model = deep()
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with fewer.compress(model, EXACT) as run:
        assert torch.equal(model.generate(prompt(40), **how)[:, 40:], run_plain(model, how))
        assert held(run.cache) == run.report.bytes_kept


def run_plain(model: Any, how: dict[str, Any]) -> Tensor:
    return model.generate(prompt(40), past_key_values=DynamicCache(config=model.config), **how)[:, 40:]


def test_forks_share_and_go_on_separately() -> None:
    model = deep()
    base = filled(model, rows=2)
    report = base.report
    following = [ids.expand(2, -1) for ids in turns()[1:]]
    first, second = base.fork(), base.fork()
    want = cached(model, first, *following)
    second.reorder_cache(torch.tensor([1, 0]))
    assert base.report == report and held(second) == second.report.bytes_kept
    assert halves(first)[2][0].pair is halves(base)[2][0].pair is halves(base)[3][0].pair
    for again, got in zip(cached(model, base.fork(), *following), want, strict=True):
        assert torch.equal(again, got)


def test_copies_and_files_hold_each_pair_once(tmp_path: Path) -> None:
    model = deep()
    base = filled(model, rows=2)
    base.save(tmp_path / "pairs.fewer")
    want = cached(model, base.fork(), *(ids.expand(2, -1) for ids in turns()[1:]))
    for other in (deepcopy(base), fewer.Cache.load(model, tmp_path / "pairs.fewer")):
        assert held(other) == other.report.bytes_kept == base.report.bytes_kept
        assert halves(other)[2][0].pair is halves(other)[3][0].pair is not halves(base)[2][0].pair
        other.reorder_cache(torch.tensor([0, 1]))
        assert held(other) == other.report.bytes_kept
        other.freeze()
        for got, ours in zip(cached(model, other, *(ids.expand(2, -1) for ids in turns()[1:])), want, strict=True):
            assert torch.equal(got, ours)


def test_stacked_rows_are_each_their_own() -> None:
    model = deep()
    base = fewer.Cache(model, "full")
    cached(model, base, prompt(40))
    caches = [base.under(method, 1.0) for method in (MINI, WIDE, "full")]
    stacked = fewer.Cache.stack(caches)
    assert held(stacked) == stacked.report.bytes_kept
    got = cached(model, stacked, *(ids.expand(3, -1) for ids in turns()[1:]))
    for row, cache in enumerate(caches):
        for together, alone in zip(got, cached(model, cache, *turns()[1:]), strict=True):
            assert_close(together[row], alone[0])


def test_under_is_pairing_in_line() -> None:
    model = deep()
    base = fewer.Cache(model, "full")
    cached(model, base, prompt(40))
    before, under, inline = base.report, base.under(MINI, 1.0), filled(model)
    inline.freeze()
    assert under.report.bytes_kept == held(under) == inline.report.bytes_kept
    assert base.report == before
    for got, want in zip(cached(model, under, *turns()[1:]), cached(model, inline, *turns()[1:]), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_batch_is_the_row_alone(side: str) -> None:
    """Two prompts one after the other, uneven both times, then single tokens."""
    model = deep()
    real = torch.ones(3, 40, dtype=torch.long)
    for row, gone in enumerate((0, 13, 39)):
        real[row, slice(0, gone) if side == "left" else slice(40 - gone, 40)] = 0
    more = torch.ones(3, 6, dtype=torch.long)
    more[1, :2] = 0
    single = torch.ones(3, 1, dtype=torch.long)
    steps = [(prompt(40, rows=3), real), (prompt(6, rows=3, seed=1), more), (prompt(1, rows=3, seed=2), single)]

    def talk(rows: slice) -> tuple[Any, list[Tensor]]:
        cache, mask, out = fewer.Cache(model, MINI), torch.zeros(len(real[rows]), 0, dtype=torch.long), []
        for ids, new in steps:
            wide = torch.ones(ids.shape[1], dtype=torch.bool) if rows == slice(None) else new[rows].bool()[0]
            mask = torch.cat([mask, new[rows][:, wide]], 1)
            at = columns(mask)[:, -int(wide.sum()) :].clamp(min=0)
            call = {"attention_mask": mask, "position_ids": at, "past_key_values": cache}
            out.append(model(ids[rows][:, wide], **call).logits)
            assert held(cache) == cache.report.bytes_kept
        return cache, out

    together, got = talk(slice(None))
    for row in range(3):
        alone, want = talk(slice(row, row + 1))
        for ours, theirs, (_, new) in zip(got, want, steps, strict=True):
            assert_close(ours[row, new[row].bool()], theirs[0])
        for mine, own in zip(together.report.layers, alone.report.layers, strict=True):
            assert mine.kept[row] == own.kept[0]


def test_a_later_prompt_is_a_pair_of_its_own() -> None:
    model = deep()
    cache = filled(model)
    first = halves(cache)[2][0]
    cached(model, cache, *turns()[1:])
    assert [len(parts) for parts in halves(cache).values()] == [2, 2]
    assert halves(cache)[2][0] is first, "what was merged is not merged again"
    assert [part.counts for part in halves(cache)[3]] == [((40, 40),), ((5, 5),)]
    assert cache.layers[2].keys.shape[2] == 2, "single tokens stay as they are"


def test_decoded_tokens_are_merged_when_asked() -> None:
    model = deep()
    cache = fewer.Cache(model, MINI, when="both", every=2)
    cached(model, cache, *turns())
    assert [[part.counts[0][0] for part in parts] for parts in halves(cache).values()] == [[40, 5, 2]] * 2
    assert all(isinstance(part, Half) for parts in halves(cache).values() for part in parts)


def test_only_what_is_no_pair_yet_can_be_cropped() -> None:
    model = deep()
    cache = filled(model)
    want = cached(model, cache.fork(), *turns()[2:])
    cache.freeze()
    cached(model, cache, turns()[1])
    cache.crop(-5)
    for got, ours in zip(cached(model, cache, *turns()[2:]), want, strict=True):
        assert_close(got, ours, within=1e-5)
    with pytest.raises(FewerError, match="held packed"):
        cache.crop(-3)


def test_half_precision() -> None:
    model = deep(dtype=torch.bfloat16)
    cache, full = fewer.Cache(model, EXACT), DynamicCache(config=model.config)
    for got, want in zip(cached(model, cache, *turns()), cached(model, full, *turns()), strict=True):
        assert_close(got.float(), want.float(), within=0.05)
    assert held(cache) == cache.report.bytes_kept


def test_two_layers_are_too_few_and_it_is_said() -> None:
    model = tiny("llama", num_hidden_layers=2)
    cache = fewer.Cache(model, MINI)
    with pytest.warns(FewerWarning, match="of 2 layers none are held in pairs"):
        cached(model, cache, prompt(40))
    assert cache.report.bytes_kept == cache.report.bytes_full


def test_what_does_not_go_with_pairs() -> None:
    model = deep()
    refused(model, FewerError, "keeps every token", MINI, 0.5)
    refused(model, FewerError, "brings its own storage", MINI, 1.0, store="kivi-4bit")
    refused(model, BudgetError, "cannot be read", MINI, "half")


def test_leaving_gives_everything_back() -> None:
    model = deep()
    model(prompt(40))
    with newborn(model) as alive:
        with fewer.compress(model, MINI) as run:
            model.generate(prompt(40), max_new_tokens=3, do_sample=False)
        run.cache = None
        assert not alive()
