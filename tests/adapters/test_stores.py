"""Packed storage under a model: what is packed once stays as it is, rows stay alone, and every byte is counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import fewer
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.kivi import KIVI
from fewer.types import BudgetError, FewerError, FewerWarning, Tokens
from tests.adapters.common import ADA, FAMILIES, SNAP, cached, held, refused, tensors_in
from tests.adapters.emulate import assert_close, columns, difference, ours
from tests.adapters.test_batches import batch
from tests.tiny import prompt, tiny

NEAR = 0.02
"""What 8 bits may move logits by, of the largest one."""
STORES: dict[str, Any] = {
    "kivi": KIVI(4, 16, 16),
    "kivi-2bit": KIVI(2, 8, 32),
    "kivi-3bit": KIVI(3, 16, 16),
    "gear": GEAR(2, 16, block=16),
    "gear-l": GEAR(4, 8, sparsity=0.0, block=32),
}
BOTH = ["kivi", "gear"]
"""Of these, where many steps are made."""
FINE: dict[str, Any] = {"kivi": KIVI(8, 16, 16), "gear": GEAR(8, 16, block=16)}


class OneHead(type(SNAP)):  # type: ignore[misc]
    """Window attention, and what the first head sees is worth far more than what the others do."""

    def score(self, tokens: Tokens) -> Tensor:
        first = torch.arange(tokens.positions.shape[1]).view(-1, 1) == 0
        return super().score(tokens) * (1 + 30 * first)


UNEVEN = AdaKV(OneHead(window=8), floor=0.1)


def singles(count: int, seed: int = 100, rows: int = 1) -> list[Tensor]:
    return [prompt(1, rows, seed=seed + step) for step in range(count)]


def contents(part: Any) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """What each row and head of a part holds."""
    read = part.read()
    return [[(read.keys[i:j], read.values[i:j], read.positions[i:j]) for i, j in row] for row in read.bounds]


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, store: Any) -> Iterator[list[list[int]]]:
    """The positions of every token that is packed, head by head, call after call."""
    packed: list[list[int]] = []
    encode = type(store).encode

    def listening(self: Any, tokens: Any, phase: Any, signals: Any) -> Any:
        packed.append([n for row in tokens.bounds for i, j in row for n in tokens.positions[i:j].tolist()])
        return encode(self, tokens, phase, signals)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "encode", listening)
        yield packed


# --- the front door ---


def test_generate_under_its_name() -> None:
    """Blocks of 128: of 150 tokens and the 129 read since, two are packed; the prompt's own logits are the model's."""
    model = tiny("llama", head_dim=32)
    ids = prompt(150)
    full = model.generate(ids, max_new_tokens=1, do_sample=False)
    with fewer.compress(model, "kivi-4bit") as run:
        out = model.generate(ids, max_new_tokens=130, do_sample=False)
    assert out.shape == (1, 280) and torch.equal(out[:, :151], full)
    assert [part.counts for part in run.cache.layers[0].parts] == [((256, 256),), ((22, 22),)]
    assert run.report.method == "kivi-4bit" and run.report.kept == 1.0
    assert run.report.bytes_kept < 0.31 * run.report.bytes_full
    assert run.cache.layers[0].keys.shape[2] == 1


def test_generate_with_fewer_tokens_in_fewer_bits() -> None:
    model = tiny("llama", head_dim=32)
    with fewer.compress(model, "snapkv", keep=0.5, store="kivi-4bit") as run:
        out = model.generate(prompt(300), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 304)
    assert [part.counts for part in run.cache.layers[0].parts] == [((128, 128),), ((22, 22),)]
    assert run.report.layers[0].kept == ((153, 153),) and run.report.layers[0].asked == (150,)


@pytest.mark.parametrize(("family", "store"), [(f, "gear") for f in FAMILIES] + [("llama", s) for s in STORES])
def test_every_family(family: str, store: str) -> None:
    """Bytes, counts and finite logits; 16 features a head everywhere."""
    model = tiny(family)
    with fewer.Cache(model, STORES[store]) as cache:
        for logits in cached(model, cache, prompt(70), *singles(20)):
            assert bool(logits.isfinite().all())
        for index in ours(cache):
            assert cache.report.layers[index].kept == ((90,) * len(cache.report.layers[index].kept[0]),)
            assert (
                cache.layers[index].coded
                and cache.report.layers[index].bytes_kept < cache.report.layers[index].bytes_full
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    for name in BOTH:
        with fewer.Cache(model, SNAP, 0.5, store=STORES[name]) as cache:
            for logits in cached(model, cache, prompt(70), *singles(17)):
                assert bool(logits.isfinite().all()) and logits.dtype == dtype
            assert held(cache) == cache.report.bytes_kept


# --- near the full cache ---


@pytest.mark.parametrize(("family", "name"), [(f, "kivi") for f in FAMILIES] + [("llama", "gear")])
def test_eight_bits_are_near_the_full_cache(family: str, name: str) -> None:
    model, ids = tiny(family), [prompt(50), *singles(20)]
    with fewer.Cache(model, FINE[name]) as cache:
        for got, want in zip(
            cached(model, cache, *ids), cached(model, DynamicCache(config=model.config), *ids), strict=True
        ):
            assert_close(got, want, NEAR)


@pytest.mark.parametrize("method", [SNAP, ADA, UNEVEN], ids=["snapkv", "adakv", "uneven"])
@pytest.mark.parametrize("name", FINE)
def test_eight_bits_are_near_the_same_tokens_in_full_precision(name: str, method: Any) -> None:
    model, ids = tiny("llama"), [prompt(90), *singles(20)]
    with fewer.Cache(model, method, 0.5, store=FINE[name]) as packed, fewer.Cache(model, method, 0.5) as plain:
        for got, want in zip(cached(model, packed, *ids), cached(model, plain, *ids), strict=True):
            assert_close(got, want, NEAR)
        assert [layer.kept for layer in packed.report.layers] == [layer.kept for layer in plain.report.layers]


def test_more_bits_are_nearer() -> None:
    model, ids = tiny("llama"), [prompt(90), *singles(30)]
    want, off = cached(model, DynamicCache(), *ids)[-1], []
    for bits in (2, 3, 4, 8):
        with fewer.Cache(model, KIVI(bits, 16, 16)) as cache:
            off.append(difference(cached(model, cache, *ids)[-1], want))
    assert off == sorted(off, reverse=True) and off[-1] > 0


def test_the_prompt_is_read_in_full_precision() -> None:
    model, ids = tiny("llama"), prompt(90)
    with fewer.Cache(model, KIVI(2, 16, 16)) as cache:
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("method", [None, UNEVEN], ids=["whole", "uneven"])
@pytest.mark.parametrize("store", STORES)
def test_attention_reads_what_is_held(store: str, method: Any) -> None:
    """One more token sees just what the same cache shows it once everything is unpacked into full precision."""
    model = tiny("llama")
    with fewer.Cache(
        model, method or STORES[store], 0.5 if method else 1.0, store=STORES[store] if method else None
    ) as cache:
        cached(model, cache, prompt(90), *singles(20))
        unpacked = fewer.Cache.stack([cache])
        assert not unpacked.layers[0].coded
        got, want = (model(prompt(1, seed=9), past_key_values=c).logits for c in (cache, unpacked))
        assert_close(got, want)


# --- packed once ---


@pytest.mark.parametrize("method", [None, SNAP, UNEVEN], ids=["whole", "snapkv", "uneven"])
@pytest.mark.parametrize("name", BOTH)
def test_what_was_packed_stays_bit_for_bit(name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While decoding, and with another turn: what a head held packed is the beginning of what it holds later, and no
    token was ever packed twice."""
    model, store = tiny("llama"), STORES[name]
    keep = {} if method is None else {"keep": 0.6, "store": store}
    with watched(monkeypatch, store) as packed, fewer.Cache(model, method or store, **keep) as cache:
        model(prompt(120), past_key_values=cache)
        turns = [*singles(20), prompt(60, seed=5), *singles(18, seed=300)]
        for ids in turns:
            before = [[contents(part) for part in layer.coded] for layer in cache.layers]
            model(ids, past_key_values=cache)
            for layer, parts in zip(cache.layers, before, strict=True):
                assert len(layer.coded) >= len(parts)
                for now, then in zip([contents(part) for part in layer.coded], parts, strict=False):
                    for mine, old in zip(now[0], then[0], strict=True):
                        for x, y in zip(mine, old, strict=True):
                            assert torch.equal(x[: len(y)], y)
        total = sum(sum(sum(row) for row in part.counts) for layer in cache.layers for part in layer.coded)
        assert sum(len(call) for call in packed) == total > 120


@pytest.mark.parametrize("name", ["kivi", "kivi-2bit", "kivi-3bit"])
def test_decoding_leaves_one_packed_part(name: str) -> None:
    """However many blocks were packed: attention would pay for each part."""
    model, store = tiny("llama"), STORES[name]
    with fewer.Cache(model, SNAP, 0.5, store=store) as cache:
        cached(model, cache, prompt(70), *singles(70))
        assert [len(layer.coded) for layer in cache.layers] == [1, 1, 1]


def test_blocks_of_decoding_have_their_own_rank_and_one_part() -> None:
    model = tiny("llama")
    with fewer.Cache(model, GEAR(4, 16, rank=3, rank_decode=1, block=16)) as cache:
        cached(model, cache, prompt(70), *singles(60))
        first, later = cache.layers[0].coded
        assert first.counts == ((64, 64),) and later.counts == ((48, 48),)
        assert (first.mended_keys.left.shape[-1], later.mended_keys.left.shape[-1]) == (3, 1)


def test_a_block_is_packed_after_as_many_new_tokens() -> None:
    """70 tokens in blocks of 32: two packed, 6 wait; the next 32 make one block, whose last 6 wait in turn."""
    model = tiny("llama")
    with fewer.Cache(model, KIVI(4, 16, 32)) as cache:
        seen = []
        for ids in (prompt(70), *singles(70)):
            model(ids, past_key_values=cache)
            layer = cache.layers[0]
            seen.append((layer.coded[0].counts[0][0], layer.kept.counts[0][0], layer.keys.shape[2]))
    assert seen[0] == (64, 6, 0) and seen[31] == (64, 6, 31) and seen[32] == (96, 6, 0) and seen[64] == (128, 6, 0)


def test_decoding_unpacks_nothing_to_pack_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewer.codec import Coded

    model = tiny("llama")
    with fewer.Cache(model, KIVI(4, 16, 16)) as cache:
        model(prompt(70), past_key_values=cache)

        def refuse(self: Any) -> Any:
            raise AssertionError("a packed part was unpacked as a whole")

        monkeypatch.setattr(Coded, "read", refuse)
        cached(model, cache, *singles(40))
        assert cache.layers[0].coded[0].counts == ((96, 96),)


# --- bytes ---


@pytest.mark.parametrize("method", [None, SNAP, UNEVEN], ids=["whole", "snapkv", "uneven"])
@pytest.mark.parametrize("name", BOTH)
def test_bytes_reported_are_bytes_held_at_every_step(name: str, method: Any) -> None:
    model, store = tiny("llama"), STORES[name]
    keep = {} if method is None else {"keep": 0.6, "store": store}
    with fewer.Cache(model, method or store, **keep) as cache:
        for ids in (prompt(120), *singles(18), prompt(60, seed=5), *singles(3)):
            model(ids, past_key_values=cache)
            assert held(cache) == cache.report.bytes_kept
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors_in(cache))


@pytest.mark.parametrize("name", STORES)
def test_bytes_are_those_the_codec_said(name: str) -> None:
    """Packed once, of 128 tokens; with a position of four bytes for each."""
    model, store = tiny("llama"), STORES[name]
    with fewer.Cache(model, store) as cache:
        model(prompt(128), past_key_values=cache)
        assert cache.report.bytes_kept == 3 * 2 * (store.bytes_for(128, 16, 16, 4) + 4 * 128)
        assert cache.report.bytes_full == 3 * 2 * 128 * 32 * 4


def test_scales_are_metadata() -> None:
    """128 tokens of 16 and 16 features in 4 bits: 2,048 bytes of codes, groups of 16: 1,024 of scales and zeros, 512 of
    positions."""
    model = tiny("llama")
    with fewer.Cache(model, KIVI(4, 16, 16)) as cache:
        model(prompt(128), past_key_values=cache)
        layer = cache.report.layers[0]
        assert layer.bytes_kept - layer.metadata == 2 * 2048 and layer.metadata == 2 * (1024 + 512)
        assert cache.report.residual == 0
        cached(model, cache, *singles(3))
        assert cache.report.residual == 3 * 2 * 3 * 32 * 4
        assert cache.report.transient == 2 * 128 * 16 * 4  # the keys of both heads


@pytest.mark.parametrize("method", [SNAP, UNEVEN], ids=["snapkv", "uneven"])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("n", [30, 60, 100, 240])
def test_a_budget_in_bytes_is_a_ceiling_at_any_length(n: int, name: str, method: Any) -> None:
    """Tokens that fill no block take more than packed ones, so a shorter prompt may need more bytes."""
    model = tiny("llama")
    for keep in ("14KB", "50KB"):
        with fewer.Cache(model, method, keep, store=STORES[name]) as cache:
            model(prompt(n), past_key_values=cache)
            assert cache.report.bytes_kept <= int(keep[:2]) * 1000


def test_packed_storage_fits_more_tokens_into_the_same_bytes() -> None:
    model, kept = tiny("llama"), []
    for store in (None, KIVI(4, 16, 16), KIVI(2, 16, 16)):
        with fewer.Cache(model, SNAP, "50KB", store=store) as cache:
            model(prompt(400), past_key_values=cache)
            kept.append(cache.report.layers[0].kept[0][0])
    assert kept[0] * 3 < kept[1] and kept[1] * 1.2 < kept[2]


# --- rows ---


@pytest.mark.parametrize("method", [None, SNAP, UNEVEN], ids=["whole", "snapkv", "uneven"])
@pytest.mark.parametrize("name", BOTH)
def test_a_padded_row_is_the_row_alone(name: str, method: Any) -> None:
    model, store = tiny("llama"), STORES[name]
    keep = {} if method is None else {"keep": 0.6, "store": store}
    lengths = [60, 37, 70]
    ids, real = batch(lengths, "left", 10)
    turns = [(ids, real), *((step, torch.ones(3, 1, dtype=torch.long)) for step in singles(18, rows=3))]
    together, mask = [], torch.zeros(3, 0, dtype=torch.long)
    with fewer.Cache(model, method or store, **keep) as cache:
        for new, there in turns:
            mask = torch.cat([mask, there], 1)
            places = columns(mask)[:, -new.shape[1] :].clamp(min=0)
            together.append(model(new, attention_mask=mask, position_ids=places, past_key_values=cache).logits)
        counts = [
            [sum(part.counts[row][head] for part in cache.layers[0].coded) for head in (0, 1)] for row in range(3)
        ]
    for row, length in enumerate(lengths):
        with fewer.Cache(model, method or store, **keep) as cache:
            alone = cached(model, cache, ids[row : row + 1, -length:], *(new[row : row + 1] for new, _ in turns[1:]))
            assert [sum(part.counts[0][head] for part in cache.layers[0].coded) for head in (0, 1)] == counts[row]
        for got, want in zip(together, alone, strict=True):
            assert_close(got[row, -want.shape[1] :], want[0])


@pytest.mark.parametrize("name", BOTH)
def test_rows_are_reordered_and_repeated(name: str) -> None:
    model, store = tiny("llama"), STORES[name]
    ids = prompt(70, rows=2)
    index = torch.tensor([1, 1, 0])
    with fewer.Cache(model, UNEVEN, 0.6, store=store) as cache, fewer.Cache(model, UNEVEN, 0.6, store=store) as other:
        cached(model, cache, ids, *singles(18, rows=2))
        cached(model, other, ids[index], *(step[index] for step in singles(18, rows=2)))
        cache.reorder_cache(index)
        assert held(cache) == cache.report.bytes_kept == other.report.bytes_kept
        after = prompt(1, rows=3, seed=7)
        assert_close(model(after, past_key_values=cache).logits, model(after, past_key_values=other).logits)


@pytest.mark.parametrize("method", [None, SNAP, UNEVEN], ids=["whole", "snapkv", "uneven"])
def test_beam_search(method: Any) -> None:
    """Over a block's end: beams are those of the same tokens in full precision, in bits enough."""
    model, store = tiny("llama"), KIVI(8, 16, 16)
    call = {
        "max_new_tokens": 24,
        "num_beams": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with fewer.compress(model, method or "full", 0.6 if method else 1.0):
        want = model.generate(prompt(50, rows=2), **call)
    keep = {"keep": 0.6, "store": store} if method else {}
    with fewer.compress(model, method or store, **keep) as run:
        got = model.generate(prompt(50, rows=2), **call)
    assert got.sequences.shape == (2, 74)
    assert_close(got.sequences_scores, want.sequences_scores, NEAR)
    assert run.cache.layers[0].coded and held(run.cache) == run.report.bytes_kept


# --- turns, chunks, copies ---


def test_chunks_pack_the_same_blocks() -> None:
    """The first layer's keys do not depend on what attention reads, so its blocks are the same by whichever chunks the
    prompt came, but for how a product rounds; later layers stay near."""
    model, ids, found = tiny("llama"), prompt(150), []
    for chunks in ((150,), (64, 86), (10, 90, 50), (33, 33, 33, 33, 18)):
        with fewer.Cache(model, KIVI(8, 16, 32)) as cache:
            logits = cached(model, cache, *ids.split(list(chunks), 1))[-1]
        (part,) = cache.layers[0].coded
        found.append((part, logits[:, -1]))
        assert part.counts == ((128, 128),) and torch.equal(part.positions, found[0][0].positions)
        for mine, first in (
            (part.packed_keys, found[0][0].packed_keys),
            (part.packed_values, found[0][0].packed_values),
        ):
            assert float((mine.codes != first.codes).float().mean()) < 0.01
        assert_close(logits[:, -1], found[0][1], 2 * NEAR)


@pytest.mark.parametrize("method", [None, SNAP, UNEVEN], ids=["whole", "snapkv", "uneven"])
@pytest.mark.parametrize("name", FINE)
def test_several_turns(name: str, method: Any) -> None:
    """Prompt, answer, prompt, answer: near the full cache where nothing is dropped; counts as asked where it is."""
    model, store = tiny("llama"), FINE[name]
    turns = [
        prompt(80),
        *singles(20),
        prompt(70, seed=5),
        *singles(20, seed=200),
        prompt(80, seed=6),
        *singles(5, seed=300),
    ]
    keep = {"keep": 0.6, "store": store} if method else {}
    with fewer.Cache(model, method or store, **keep) as cache:
        got = cached(model, cache, *turns)
        assert held(cache) == cache.report.bytes_kept
        if method is None:
            for mine, want in zip(got, cached(model, DynamicCache(), *turns), strict=True):
                assert_close(mine, want, NEAR)
            assert cache.report.layers[0].kept == ((275, 275),)
        else:
            assert cache.report.layers[0].asked == (162,) and sum(cache.report.layers[0].kept[0]) == 2 * (162 + 5)


def test_where_tokens_are_dropped_generated_ones_wait_for_the_next_turn() -> None:
    """Of 80 tokens 64 are packed. 32 more could be packed too, and then none of them could be dropped: they wait, and
    the next turn keeps 0.8 of all 114."""
    model = tiny("llama")
    with fewer.Cache(model, SNAP, 0.8, store=KIVI(4, 16, 16)) as cache:
        cached(model, cache, prompt(80), *singles(32))
        assert [part.counts for part in cache.layers[0].coded] == [((64, 64),)]
        assert cache.layers[0].keys.shape[2] == 32
        model(prompt(2, seed=5), past_key_values=cache)
        assert cache.report.layers[0].kept == ((92, 92),) and cache.report.layers[0].asked == (92,)
        assert sum(part.counts[0][0] for part in cache.layers[0].coded) == 80


@pytest.mark.parametrize("name", STORES)
def test_copies_go_on_by_themselves(name: str) -> None:
    """A fork packs no more and shares what is packed; a deep copy does all that the first one does."""
    from copy import deepcopy

    model, ids = tiny("llama"), singles(20)
    with fewer.Cache(model, STORES[name]) as cache:
        model(prompt(90), past_key_values=cache)
        before = held(cache)
        fork, copy = cache.fork(), deepcopy(cache)
        want = cached(model, cache, *ids)
        assert held(fork) == before
        for mine, other in zip(cached(model, copy, *ids), want, strict=True):
            assert torch.equal(mine, other)
        assert_close(cached(model, fork, *ids)[0], want[0])
        assert [part.counts for part in copy.layers[0].coded] == [part.counts for part in cache.layers[0].coded]
        copy.release()


@pytest.mark.parametrize("method", [None, SNAP, UNEVEN], ids=["whole", "snapkv", "uneven"])
def test_a_cache_under_a_store_is_what_it_would_be_in_line(method: Any) -> None:
    model, store = tiny("llama"), KIVI(4, 16, 16)
    chosen, keep = (method or store), (0.6 if method else 1.0)
    with fewer.Cache(model, "full" if method is None else method, 1.0) as whole:
        model(prompt(90), past_key_values=whole)
        under = whole.under(chosen, keep, store=store if method else None)
    with fewer.Cache(model, chosen, keep, store=store if method else None) as inline:
        model(prompt(90), past_key_values=inline)
    for one, two in zip(under.layers, inline.layers, strict=True):
        assert len(one.coded) == len(two.coded) == 1
        for mine, other in zip(contents(one.coded[0])[0], contents(two.coded[0])[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize("name", STORES)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), singles(20)
    with fewer.Cache(model, SNAP, 0.6, store=STORES[name]) as cache:
        cached(model, cache, prompt(90), *ids)
        cache.save(tmp_path / "cache.safetensors")
        with fewer.Cache.load(model, tmp_path / "cache.safetensors") as loaded:
            assert loaded.report.bytes_kept == cache.report.bytes_kept
            for got, want in zip(cached(model, loaded, *ids), cached(model, cache, *ids), strict=True):
                assert torch.equal(got, want)


def test_nothing_packed_holds_on_to_a_graph() -> None:
    model = tiny("llama")
    for store in (KIVI(4, 16, 16), GEAR(2, 16, block=16)):
        with torch.enable_grad(), fewer.Cache(model, store) as cache:
            cached(model, cache, prompt(40), *singles(18))
            assert not any(x.requires_grad for part in cache.layers[0].coded for x in tensors_in(part))


# --- what is refused ---


def test_heads_that_do_not_divide_are_refused_at_the_door() -> None:
    model = tiny("llama")
    refused(model, FewerError, "values of 16 features do not divide into groups of 32; choose group=16", "kivi", 1.0)
    refused(model, FewerError, "values of 16 features do not divide into groups of 64", SNAP, 0.5, store="gear-2bit")
    refused(model, FewerError, "do not divide into groups", KIVI(group=32), 1.0)


def test_keeping_less_and_fixed_sizes_are_refused() -> None:
    model = tiny("llama")
    refused(model, FewerError, "KIVI keeps every token", KIVI(4, 16, 16), 0.5)
    refused(model, FewerError, "GEAR brings its own storage", GEAR(2, 16, block=16), 1.0, store=KIVI(4, 16, 16))
    refused(model, FewerError, "what was packed is never packed again", SNAP, 0.5, store=KIVI(4, 16, 16), when="both")
    refused(model, FewerError, "bits=5", SNAP, 0.5, store="kivi-5bit")


def test_what_is_packed_cannot_be_cropped() -> None:
    model = tiny("llama")
    with fewer.Cache(model, KIVI(4, 16, 16)) as cache:
        cached(model, cache, prompt(40), *singles(3))
        cache.crop(-3)
        assert cache.get_seq_length() == 40
        with pytest.raises(FewerError, match="the others are held packed"):
            cache.crop(-1)


@pytest.mark.parametrize("name", ["knorm", "tova", "adakv"])
def test_a_turn_of_which_nothing_could_stay_is_refused_and_the_cache_goes_on(name: str) -> None:
    """What is packed stays: 64 tokens in blocks of 16 are all that may be. Frozen, the cache keeps what comes."""
    model = tiny("llama")
    with fewer.Cache(model, name, 64, store=KIVI(4, group=8, residual=16)) as cache:
        cached(model, cache, prompt(100))
        before = cache.report.layers[0].kept
        if name == "adakv":  # uneven heads, so that something waits, and may go
            assert sum(before[0]) == 2 * 64
        else:
            with pytest.raises(BudgetError, match=r"keep=64: 64 tokens a head are packed already.* of the 80 new ones"):
                cached(model, cache, prompt(80, seed=1))
        cache.freeze()
        cached(model, cache, prompt(80, seed=1))
        assert [layer.seen for layer in cache.report.layers] == [(180,)] * 3
        assert cache.report.layers[0].kept == (tuple(count + 80 for count in before[0]),)


def test_a_turn_of_which_next_to_nothing_stays_is_said() -> None:
    model = tiny("llama")
    for keep in (70, "20KB"):
        with fewer.Cache(model, "knorm", keep, store=KIVI(4, group=8, residual=16)) as cache:
            cached(model, cache, prompt(100))
            with pytest.warns(
                FewerWarning, match=f"keep={keep!r}: what was packed in earlier forwards stays, and leaves"
            ):
                cached(model, cache, prompt(80, seed=1))
    with fewer.Cache(model, "knorm", 0.3, store=KIVI(4, group=8, residual=16)) as cache:
        cached(model, cache, prompt(100), prompt(80, seed=1))
        assert not cache.report.notes
