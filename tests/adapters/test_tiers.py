"""Methods that hold all tokens, some in more bits than others: what is packed stays, nothing is lost or doubled."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fewer
from fewer.methods.kv.mikv import MiKV
from fewer.methods.kv.zipcache import ZipCache
from fewer.methods.kv.zipvl import ZipVL
from fewer.types import FewerError, FewerWarning
from tests.adapters.common import cached, held
from tests.adapters.emulate import assert_close, columns, difference, ours
from tests.tiny import prompt, tiny

# how ZipVL reads a prompt is tested in test_among.py
METHODS: dict[str, Any] = {
    "zipcache": ZipCache(),
    "mikv": MiKV(),
    "mikv, all packed": MiKV(bits_important=8),
    "zipvl": ZipVL(tau=0.8, dense=True),
}
FINE: dict[str, Any] = {
    "zipcache": ZipCache(bits_important=8, bits_others=8),
    "mikv": MiKV(bits_others=8),
    "mikv, all packed": MiKV(bits_important=8, bits_others=8),
    "zipvl": ZipVL(tau=0.8, dense=True, bits_important=8, bits_others=8),
}
"""In 8 bits, so that logits stay near those of the full cache."""
NEAR = 0.03
"""What 8 bits may move logits by, of the largest one; the default bits move them by more than this."""


def everything(layer: Any) -> list[list[Counter[int]]]:
    """The positions that a layer holds, for each row and head."""
    b, h = layer.keys.shape[:2]
    places, hidden = layer._tail()
    out = [[Counter(places[row][~hidden[row]].tolist()) for _ in range(h)] for row in range(b)]
    for part in layer.parts:
        plain = part.read()
        for row, spans in enumerate(plain.bounds):
            for head, (start, end) in enumerate(spans):
                out[row][head].update(plain.positions[start:end].tolist())
    return out


def holds_each_once(cache: Any, real: list[int]) -> None:
    for index in ours(cache):
        assert everything(cache.layers[index]) == [[Counter(range(n))] * 2 for n in real] or (
            everything(cache.layers[index]) == [[Counter(range(n))] * 4 for n in real]
        )


def test_a_token_that_is_lost_or_doubled_or_changed_is_seen() -> None:
    model = tiny("llama")
    with fewer.Cache(model, ZipCache()) as cache:
        cached(model, cache, prompt(20))
        layer = cache.layers[1]
        holds_each_once(cache, [20])
        before, parts = packed_numbers(layer), layer.coded
        for wrong in (parts[:1], (*parts, parts[1])):
            layer.coded = wrong
            with pytest.raises(AssertionError):
                holds_each_once(cache, [20])
        layer.coded = parts
        stays(before, layer)
        parts[1].held_keys.codes[0] ^= 1
        with pytest.raises(AssertionError):
            stays(before, layer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("name", FINE)
def test_generate(family: str, name: str) -> None:
    """Greedy tokens in 8 bits are those of the full cache, but where two were as good as equal."""
    model = tiny(family)
    full = model.generate(
        prompt(40, rows=2), max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with fewer.compress(model, FINE[name], every=4) as run:
        out = model.generate(prompt(40, rows=2), max_new_tokens=12, do_sample=False)
    assert out.shape == (2, 52)
    for row in range(2):
        apart = (out[row, 40:] != full.sequences[row, 40:]).nonzero()
        if len(apart):  # the first different token was nearly as likely
            logits = full.logits[int(apart[0])][row]
            assert float(logits.max() - logits[out[row, 40 + int(apart[0])]]) < 2 * NEAR * float(logits.abs().max())
    holds_each_once(run.cache, [51, 51])
    assert all(layer.kept == ((51,) * len(layer.kept[0]),) * 2 for layer in run.report.layers if layer.kept)


@pytest.mark.parametrize("name", FINE)
def test_logits_are_near_those_of_the_full_cache(name: str) -> None:
    model, ids = tiny("llama"), [prompt(50), *(prompt(1, seed=s) for s in range(9))]
    full = DynamicCache(config=model.config)
    with fewer.Cache(model, FINE[name], every=3) as fine, fewer.Cache(model, METHODS[name], every=3) as coarse:
        for want, got in zip(cached(model, full, *ids), cached(model, fine, *ids), strict=True):
            assert_close(got, want, NEAR)
        assert fine.report.bytes_kept > coarse.report.bytes_kept
        off = [difference(a, b) for a, b in zip(cached(model, coarse, *ids), cached(model, full, *ids), strict=True)]
    assert off[0] < 1 and off[-1] > 0  # the prompt itself was read before anything was packed


@pytest.mark.parametrize("name", METHODS)
def test_attention_reads_what_is_held(name: str) -> None:
    """One more token sees just what a plain cache would show it that holds the unpacked keys and values."""
    model = tiny("llama")
    with fewer.Cache(model, METHODS[name], every=3) as cache:
        cached(model, cache, prompt(50), *(prompt(1, seed=s) for s in range(7)))
        plain = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            dense = layer._dense()
            order = dense.positions.argsort(-1)
            dense = dense.take(order)
            plain.update(dense.keys, dense.values, index)
        want = model(prompt(1, seed=9), past_key_values=plain).logits
        assert_close(model(prompt(1, seed=9), past_key_values=cache).logits, want)


def test_sixteen_bits_everywhere_is_the_full_cache() -> None:
    model, ids = tiny("llama"), [prompt(40), prompt(5, seed=1), prompt(1, seed=2), prompt(1, seed=3)]
    with fewer.Cache(model, MiKV(bits_others=16), every=1) as cache:
        for got, want in zip(cached(model, cache, *ids), cached(model, DynamicCache(), *ids), strict=True):
            assert torch.equal(got, want)


def test_when_all_are_important_none_is_packed() -> None:
    """The tiers are really used here, and the logits are the full cache's to float32's accuracy."""
    model, ids = tiny("llama"), [prompt(40), prompt(5, seed=1), prompt(1, seed=2), prompt(1, seed=3)]
    with fewer.Cache(model, MiKV(important=1.0), every=1) as cache:
        for got, want in zip(cached(model, cache, *ids), cached(model, DynamicCache(), *ids), strict=True):
            assert_close(got, want)
        assert not cache.layers[0].coded and cache.layers[0].kept.counts == ((47, 47),)


def packed_numbers(layer: Any) -> dict[tuple[int, int, int], Tensor]:
    """Key and value of every token that is held in fewer bits, by row, head and position."""
    out = {}
    for part in layer.coded:
        plain = part.read()
        for row, spans in enumerate(plain.bounds):
            for head, (start, end) in enumerate(spans):
                for at in range(start, end):
                    out[row, head, int(plain.positions[at])] = torch.cat([plain.keys[at], plain.values[at]])
    return out


def stays(before: dict[Any, Tensor], layer: Any) -> None:
    """What was packed reads as it did, to the bit."""
    now = packed_numbers(layer)
    assert all(torch.equal(x, now[place]) for place, x in before.items())


def split(layer: Any) -> list[tuple[int, ...]]:
    return [part.counts[0] for part in layer.parts]


def test_decoded_tokens_are_packed_every_so_many_steps_and_what_was_packed_stays() -> None:
    """ZipCache in steps of 5: three of each five join those in 4 bits, two those in 2."""
    model = tiny("llama")
    with fewer.Cache(model, ZipCache(), every=5) as cache:
        cached(model, cache, prompt(40))
        layer = cache.layers[0]
        assert [part.held_keys.bits for part in layer.coded] == [4, 2]
        for step in range(1, 16):
            before = packed_numbers(layer)
            cached(model, cache, prompt(1, seed=step))
            stays(before, layer)
            times = step // 5
            assert split(layer) == [(24 + 3 * times,) * 2, (16 + 2 * times,) * 2]
            assert layer.coded[0].held_keys.scale.shape == (2 * (1 + times), 16)  # each packing with its own extremes
            assert layer.keys.shape[2] == step % 5 and layer.kept is None
            assert held(cache) == cache.report.bytes_kept
            holds_each_once(cache, [40 + step])


def test_full_precision_tokens_compete_on_and_packed_ones_stay() -> None:
    """MiKV in steps of 4: half of all tokens seen are in full precision, and two of them lose that each time."""
    model = tiny("llama")
    with fewer.Cache(model, MiKV(), every=4) as cache:
        cached(model, cache, prompt(40))
        layer = cache.layers[0]
        for step in range(1, 13):
            before = packed_numbers(layer)
            cached(model, cache, prompt(1, seed=step))
            stays(before, layer)
            times = step // 4
            assert split(layer) == [(20 + 2 * times,) * 2, (20 + 2 * times,) * 2]
            holds_each_once(cache, [40 + step])


def test_published_defaults() -> None:
    model = tiny("llama")
    for method, when, every in ((ZipCache(), "both", 100), (MiKV(), "both", 64), (ZipVL(), "prefill", 64)):
        policy = fewer.Cache(model, method).shared.policy
        assert (policy.when, policy.every) == (when, every)
        policy = fewer.Cache(model, method, when="decode", every=7).shared.policy
        assert (policy.when, policy.every) == ("decode", 7)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_bytes_reported_are_bytes_held_at_every_step(name: str, when: str) -> None:
    model = tiny("llama")
    with fewer.Cache(model, METHODS[name], when=when, every=3) as cache:
        for ids in (prompt(40), prompt(7, seed=1), *(prompt(1, seed=s) for s in range(8)), prompt(20, seed=2)):
            cached(model, cache, ids)
            assert held(cache) == cache.report.bytes_kept
        holds_each_once(cache, [75])


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_what_the_codecs_say(name: str) -> None:
    model = tiny("llama")
    with fewer.Cache(model, METHODS[name]) as cache:
        cached(model, cache, prompt(60))
        for layer in cache.layers:
            for part, store in zip(layer.coded, [s for s in METHODS[name].store if s], strict=True):
                asked = sum(store.bytes_for(count, 16, 16, 4) for row in part.counts for count in row)
                assert part.nbytes == asked + part.positions.nbytes


def padded(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    n = max(lengths)
    ids, real = torch.zeros(len(lengths), n, dtype=torch.long), torch.zeros(len(lengths), n, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, n - length :], real[row, n - length :] = prompt(length, seed=seed + row)[0], 1
    return ids, real


def talk(model: Any, method: Any, turns: list[tuple[Tensor, Tensor]]) -> tuple[Any, list[Tensor]]:
    cache, mask, out = fewer.Cache(model, method, every=2), torch.zeros(len(turns[0][0]), 0, dtype=torch.long), []
    for ids, real in turns:
        mask = torch.cat([mask, real], 1)
        call = {"attention_mask": mask, "position_ids": columns(mask)[:, -ids.shape[1] :].clamp(min=0)}
        out.append(model(ids, past_key_values=cache, **call).logits)
        assert held(cache) == cache.report.bytes_kept
    return cache, out


def by_tier(cache: Any, row: int) -> list[list[tuple[type, int, list[int]]]]:
    """For each layer, the positions of each part of this row's first head that has any."""
    out = []
    for layer in cache.layers:
        plain = [(type(part), part.read()) for part in layer.parts]
        spans = [(kind, part, *part.bounds[row][0]) for kind, part in plain]
        out.append([(kind, e - s, part.positions[s:e].tolist()) for kind, part, s, e in spans if e > s])
    return out


@pytest.mark.parametrize("name", FINE)
def test_a_row_in_a_padded_batch_is_the_row_alone(name: str) -> None:
    model, lengths, later = tiny("llama"), [40, 27, 33], [3, 6, 2]
    one = torch.ones(3, 1, dtype=torch.long)
    turns = [padded(lengths, 10), padded(later, 20), *((prompt(1, rows=3, seed=s), one) for s in (30, 31, 32))]
    cache, batch = talk(model, FINE[name], turns)
    holds_each_once(cache, [a + b + 3 for a, b in zip(lengths, later, strict=True)])
    for row in range(3):
        own = [
            (ids[row : row + 1, -int(real[row].sum()) :], real[row : row + 1, -int(real[row].sum()) :])
            for ids, real in turns
        ]
        alone, logits = talk(model, FINE[name], own)
        assert by_tier(alone, 0) == by_tier(cache, row)
        for got, want in zip(batch, logits, strict=True):
            assert_close(got[row : row + 1, -want.shape[1] :], want, NEAR)


@pytest.mark.parametrize("name", FINE)
def test_a_prompt_in_chunks(name: str) -> None:
    """Each chunk is packed by its own queries as it comes, and nothing before it is packed anew."""
    model, ids = tiny("llama"), prompt(50)
    full = model(ids).logits
    with fewer.Cache(model, FINE[name]) as cache:
        seen = 0
        for end in (20, 21, 35, 50):
            before = packed_numbers(cache.layers[0])
            got = cached(model, cache, ids[:, seen:end])[0]
            stays(before, cache.layers[0])
            assert_close(got, full[:, seen:end], NEAR)
            seen = end
            holds_each_once(cache, [seen])


@pytest.mark.parametrize("name", METHODS)
def test_one_token_prompts_and_rows(name: str) -> None:
    model = tiny("llama")
    with fewer.Cache(model, METHODS[name], every=2) as cache:
        cached(model, cache, prompt(1), *(prompt(1, seed=s) for s in range(5)))
        holds_each_once(cache, [6])
        assert held(cache) == cache.report.bytes_kept
    cache, _ = talk(model, METHODS[name], [padded([1, 12], 0), (prompt(1, rows=2), torch.ones(2, 1, dtype=torch.long))])
    holds_each_once(cache, [2, 13])


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_reordered_and_repeated_with_their_channels(name: str) -> None:
    model = tiny("llama")
    ids, real = padded([20, 31], 0)
    with fewer.Cache(model, METHODS[name], every=2) as cache, fewer.Cache(model, METHODS[name], every=2) as other:
        for each in (cache, other):
            model(ids, attention_mask=real, past_key_values=each)
        for layer in cache.layers:
            layer.reorder_cache(torch.tensor([1, 0, 1]))
        mask = torch.cat([real, torch.ones(2, 1, dtype=torch.long)], 1)
        for step in range(1, 4):
            nexts = prompt(1, rows=2, seed=step)
            want = model(nexts, attention_mask=mask, past_key_values=other).logits
            got = model(nexts[[1, 0, 1]], attention_mask=mask[[1, 0, 1]], past_key_values=cache).logits
            assert_close(got, want[[1, 0, 1]], NEAR)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            assert held(cache) == cache.report.bytes_kept


@pytest.mark.parametrize("name", METHODS)
def test_beams(name: str) -> None:
    model = tiny("llama")
    with fewer.compress(model, METHODS[name], every=3) as run:
        out = model.generate(prompt(30), max_new_tokens=8, num_beams=3, do_sample=False)
    assert out.shape == (1, 38)
    holds_each_once(run.cache, [37] * 3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("when", ["prefill", "both"])
def test_a_saved_cache_goes_on_as_it_was(name: str, when: str, tmp_path: Path) -> None:
    model, more = tiny("llama"), [prompt(1, seed=s) for s in range(8)]
    with fewer.Cache(model, METHODS[name], when=when, every=3) as cache:
        cached(model, cache, prompt(40), *more[:2])
        cache.save(tmp_path / "cache")
        want = cached(model, cache, *more[2:])
        report = cache.report
    with fewer.Cache.load(model, tmp_path / "cache") as loaded:
        assert all(torch.equal(a, b) for a, b in zip(cached(model, loaded, *more[2:]), want, strict=True))
        assert loaded.report.bytes_kept == report.bytes_kept


@pytest.mark.parametrize("name", METHODS)
def test_under_is_compressing_in_line(name: str) -> None:
    """The balancer, too, comes from the cache that gathered it."""
    model = tiny("llama")
    gathers = MiKV(bits_others=16) if "mikv" in name else ZipVL(variant="drop")
    with fewer.Cache(model, gathers) as base, fewer.Cache(model, METHODS[name]) as inline:
        cached(model, base, prompt(40))
        under = base.under(METHODS[name], 1.0)
        cached(model, inline, prompt(40))
        inline.freeze()
        assert by_tier(under, 0) == by_tier(inline, 0)
        assert torch.equal(*(cached(model, cache, prompt(1, seed=1))[0] for cache in (under, inline)))


def test_dropping_keeps_what_tau_asks_for_and_no_more_than_keep() -> None:
    model = tiny("llama")
    with fewer.Cache(model, ZipVL(0.6, "drop"), 0.9) as cache:
        with pytest.warns(FewerWarning, match="tau"):
            cached(model, cache, prompt(60))
        kept = [layer.kept[0] for layer in cache.report.layers]
        assert all(a == b < 54 for a, b in kept) and len(set(kept)) > 1  # each layer by itself
        assert held(cache) == cache.report.bytes_kept
    with fewer.Cache(model, ZipVL(0.6, "drop"), 3) as cache:
        cached(model, cache, prompt(60), prompt(1))
        assert [layer.kept for layer in cache.report.layers] == [((4, 4),)] * 3


def test_cropping_goes_into_full_precision_only() -> None:
    """A plan without tiers means the first one: with nothing packed, a crop leaves one copy of each token."""
    model = tiny("llama")
    with fewer.Cache(model, MiKV(important=1.0)) as cache:
        cached(model, cache, prompt(30))
        cache.crop(-5)
        holds_each_once(cache, [25])
        cached(model, cache, prompt(5, seed=1))
        holds_each_once(cache, [30])
    with fewer.Cache(model, MiKV()) as cache:
        cached(model, cache, prompt(30), prompt(1))
        cache.crop(-1)
        with pytest.raises(FewerError, match="packed"):
            cache.crop(-1)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_is_refused(name: str) -> None:
    model = tiny("llama")
    with pytest.raises(FewerError, match="keeps every token"):
        fewer.Cache(model, METHODS[name], 0.5)
    with pytest.raises(FewerError, match="its own storage"):
        fewer.Cache(model, METHODS[name], store="kivi-4bit")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    with fewer.Cache(model, METHODS[name], every=2) as cache:
        out = cached(model, cache, prompt(40), *(prompt(1, seed=s) for s in range(4)))
        assert all(bool(x.isfinite().all()) and x.dtype == dtype for x in out)
        assert held(cache) == cache.report.bytes_kept < cache.report.bytes_full
