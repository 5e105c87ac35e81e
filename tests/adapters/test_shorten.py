"""A prompt that gets shorter on its way through the layers: later layers compute on fewer tokens, and are right."""

import copy
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import fewer
from fewer.adapters.hf_shorten import Sliding, blocks
from fewer.cost import Decoder
from fewer.methods.kv.fastkv import FastKV
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.snapkv import SnapKV
from fewer.types import FewerError, UnsupportedModel
from tests.adapters.common import FAMILIES, cached, held, refused, untouched
from tests.adapters.emulate import (
    MASKED,
    View,
    _views,
    _weights,
    assert_close,
    attentions,
    columns,
    difference,
    kept_positions,
    ours,
    view_of,
)
from tests.adapters.test_batches import FIRST, batch, conversation
from tests.tiny import prompt, tiny

FAST = FastKV(window=4, kernel=3, rate=0.3)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


class Emulation:
    """A shortened prefill, and the same model on all tokens with those hidden from later layers that do not go on.

    Who goes on is worked out here once more, from the whole attention matrix of the plain model; the rest of what its
    layers may see is read from the positions that the fewer cache kept, as in `Twin`.
    """

    def __init__(self, family: str, method: FastKV, keep: Any, attn: str = "sdpa", **changes: Any) -> None:
        self.model, self.plain = (tiny(family, attn=name, **changes) for name in (attn, MASKED))
        self.method, self.cache = method, fewer.Cache(self.model, method, keep)
        self.full = DynamicCache(config=self.plain.config)
        self.seen = self.gone = torch.zeros(0)
        mine = ours(self.cache)
        self.after = mine[method.shortens(len(mine))]

    def step(self, ids: Tensor, real: Tensor | None = None, blind: bool = False) -> tuple[Tensor, Tensor]:
        """Logits of both for the real tokens that go on. `blind` hides one token more."""
        new = torch.ones_like(ids) if real is None else real
        q = ids.shape[1]
        views = self._views()
        self.seen = torch.cat([self.seen, new], 1) if self.seen.numel() else new
        call = {"attention_mask": self.seen, "position_ids": columns(self.seen)[:, -q:].clamp(min=0)}
        going = self._going(ids, new.bool(), views, call) if q > 1 else new.bool()
        got = self.model(ids, past_key_values=self.cache, **call).logits
        if not going.equal(new.bool()):
            assert got.isnan().all(-1).equal(~going), "no number for those that stay behind"
        shown = going.clone()
        if blind:
            shown[0, int(going[0].nonzero()[0])] = False
        want = self._masked(ids, self.full, self._later(views, ~shown & new.bool()), call)
        self.gone = torch.cat([self.gone, ~shown & new.bool()], 1) if self.gone.numel() else ~shown & new.bool()
        return got[going], want[going]

    def _views(self) -> dict[int, View]:
        """What each layer of ours holds of what came before."""
        if not self.seen.numel():
            return {}
        return {i: view_of(self.cache.layers[i], self._heads, columns(self.seen)) for i in ours(self.cache)}

    def _later(self, views: dict[int, View], behind: Tensor) -> dict[int, View]:
        """The same, and for later layers nothing of the new columns that stay behind."""
        views, (b, q) = dict(views), behind.shape
        for index, layer in enumerate(self.full.layers):
            if index <= self.after:
                continue
            if index in views:
                old = views[index].keep
                views[index] = View(torch.cat([old, ~behind[:, None].expand(b, old.shape[1], q)], 2))
            else:
                every = ~torch.cat([self.gone, behind], 1) if self.gone.numel() else ~behind
                held = layer.keys.shape[2] if layer.is_initialized else 0  # of a sliding layer, no more than its window
                views[index] = View(every[:, None, -(held + q) :].expand(b, self._heads, held + q))
        return views

    def _masked(self, ids: Tensor, cache: DynamicCache, views: dict[int, View], call: dict[str, Any]) -> Tensor:
        for module in attentions(self.plain):
            if module.layer_idx in views:
                _views[module] = views[module.layer_idx]
        logits: Tensor = self.plain(ids, past_key_values=cache, **call).logits
        _views.clear()
        return logits

    def _going(self, ids: Tensor, new: Tensor, views: dict[int, View], call: dict[str, Any]) -> Tensor:
        """Which of the new columns go on, from the attention weights of the layer that decides."""
        self._masked(ids, copy.deepcopy(self.full), views, call)
        module = next(m for m in attentions(self.plain) if m.layer_idx == self.after and m in _weights)
        weights, going, q = _weights[module], new.clone(), ids.shape[1]
        old = weights.shape[-1] - q
        for row in range(len(ids)):
            fresh = (old + new[row].nonzero().flatten()).tolist()
            window, count = fresh[-self.method.window :], max(ceil(0.3 * len(fresh) - 1e-9), self.method.window)
            if count >= len(fresh):
                continue
            votes = dict.fromkeys(fresh[: -len(window)], 0.0)
            for head, seen in enumerate(weights[row]):
                before = self._held(views, row, head * self._heads // len(weights[row]), old) + list(votes)
                rated = [float(seen[[c - old for c in window], j].sum()) for j in before]
                padded = [0.0, *rated, 0.0]
                for j, column in enumerate(before):
                    if column in votes:
                        votes[column] += sum(padded[j : j + 3]) / 3
            best = sorted(votes, key=lambda c: (votes[c], c), reverse=True)[: count - len(window)]
            going[row] = torch.isin(torch.arange(old, old + q), torch.tensor([*best, *window]))
        return going

    @property
    def _heads(self) -> int:
        return getattr(self.plain.config, "num_key_value_heads", None) or self.plain.config.num_attention_heads

    def _held(self, views: dict[int, View], row: int, head: int, old: int) -> list[int]:
        """Old columns that the deciding layer still holds at a key-value head."""
        if not old:
            return []
        real = self.seen[row, :old].bool()
        held: list[int] = (real & views[self.after].keep[row, head, :old]).nonzero().flatten().tolist()
        return held


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_equals_masking(family: str, keep: float) -> None:
    """A prompt, single tokens, a second turn that is shortened again, and on."""
    emulation = Emulation(family, FAST, keep)
    for seed, n in enumerate([44, 1, 1, 17, 1, 1]):
        assert_close(*emulation.step(prompt(n, seed=seed)))
    later = emulation.cache.layers[ours(emulation.cache)[-1]]
    assert sum(later.report().kept[0]) < 0.5 * 65 * len(later.report().kept[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_removal_equals_masking(family: str, side: str) -> None:
    emulation = Emulation(family, FAST, 0.25)
    for ids, real in conversation(side):
        assert_close(*emulation.step(ids, real))


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_that_hold_nothing_but_padding_of_a_row(family: str) -> None:
    emulation = Emulation(family, FAST, 20)
    ids, real = batch([40, 12, 33], "left", 10)
    for at in (slice(0, 16), slice(16, 32), slice(32, 40)):
        assert_close(*emulation.step(ids[:, at], real[:, at]))
    assert_close(*emulation.step(prompt(1, rows=3)))
    assert [sum(row) // len(row) for row in emulation.cache.report.layers[-1].kept] == [15, 9, 14]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_any_layer_may_decide(layer: int, attn: str) -> None:
    method = FastKV(window=4, kernel=3, rate=0.3, layer=layer)
    emulation = Emulation("llama", method, 0.5, attn, num_hidden_layers=4)
    for seed, n in enumerate([44, 1, 17, 1]):
        assert_close(*emulation.step(prompt(n, seed=seed)))


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_eager_hosts_with_padding(family: str) -> None:
    emulation = Emulation(family, FAST, 0.25, "eager")
    for ids, real in conversation("left"):
        assert_close(*emulation.step(ids, real))


def test_the_last_layer_has_none_after_it() -> None:
    model, turns = tiny("llama"), (prompt(44), prompt(1))
    with fewer.Cache(model, FastKV(layer=2), 0.3) as fast, fewer.Cache(model, SnapKV(8, 7), 0.3) as snap:
        for got, want in zip(cached(model, fast, *turns), cached(model, snap, *turns), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_one_token_more_is_noticed(family: str) -> None:
    """The comparison's own test."""
    emulation = Emulation(family, FAST, 0.5)
    got, want = emulation.step(prompt(44), blind=True)
    assert difference(got[1:], want[1:]) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_tokens_behind_matters_at_all(family: str) -> None:
    model = tiny(family)
    with fewer.Cache(model, FAST, 1.0) as short, fewer.Cache(model, SnapKV(4, 3), 1.0) as long:
        got, want = (cached(model, cache, prompt(44))[0] for cache in (short, long))
    assert int((~got.isnan().any(-1)).sum()) == 14 and not bool(want.isnan().any())
    assert difference(got[:, -1], want[:, -1]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_later_layers_are_given_fewer_tokens(family: str) -> None:
    model, sizes = tiny(family), {}
    with fewer.Cache(model, FAST, 0.2) as cache:
        for index, block in enumerate(blocks(cache.shared.host)):
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(
                        lambda m, args, out, at=(index, name): sizes.__setitem__(at, args[0].shape[1])
                    )
        after = ours(cache)[FAST.shortens(len(ours(cache)))]
        cached(model, cache, prompt(50))
        assert {index: n for (index, _), n in sizes.items()} == {
            index: 50 if index <= after else 15 for index in range(model.config.num_hidden_layers)
        }
        assert len(set(sizes)) == len(sizes) > model.config.num_hidden_layers
        cached(model, cache, prompt(1))
        assert set(sizes.values()) == {1}


def test_the_closed_form_counts_what_is_computed() -> None:
    """Every product of a weight and a token, and attention as the closed form has it."""
    model, done = tiny("llama"), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: done.append(2 * m.weight.numel() * args[0].shape[1]))
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    sizes = Decoder(3, 4, 2, 16, parameters=sum(linear), itemsize=4, embedding=linear[-1])
    with fewer.Cache(model, FAST, 0.2) as cache:
        cached(model, cache, prompt(50))
    attention = 2 * 2 * 4 * 16 * (2 * 50 * 51 + 15 * 16) // 2
    assert sizes.shortened_prefill_flops(50, layer=1, rate=0.3) == sum(done) + attention
    done.clear()
    cached(model, DynamicCache(config=model.config), prompt(50))
    assert sizes.prefill_flops(50) == sum(done) + 2 * 2 * 4 * 16 * 3 * 50 * 51 // 2
    of = Decoder.of(model)
    assert of.embedding == 2 * 97 * 64
    assert of.shortened_prefill_flops(50, layer=2, rate=0.3) == of.prefill_flops(50)
    assert of.shortened_prefill_flops(50, layer=0, rate=1.0) == of.prefill_flops(50)


# --- budgets and reports ---


@pytest.mark.parametrize(("keep", "early", "late"), [(0.1, 10, 10), (0.3, 30, 30), (0.6, 60, 30), (1.0, 100, 30)])
@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_count_the_whole_prompt_in_every_layer(family: str, keep: float, early: int, late: int) -> None:
    model = tiny(family)
    with fewer.Cache(model, FAST, keep) as cache:
        cached(model, cache, prompt(100))
        after = ours(cache)[FAST.shortens(len(ours(cache)))]
        for layer in (cache.report.layers[index] for index in ours(cache)):
            assert layer.seen == (100,) and layer.asked in ((), (round(keep * 100),))
            assert set(layer.kept[0]) == {early if layer.layer <= after else late}
        cached(model, cache, prompt(1))
        assert cache.get_seq_length() == 101 and {layer.length for layer in cache.shared.members} == {101}
        assert any(f"layers after layer {after} read only" in note for note in cache.report.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_reported_are_bytes_held(family: str) -> None:
    model = tiny(family)
    with fewer.Cache(model, FAST, 0.25) as cache:
        for ids in (prompt(100, rows=2), prompt(1, rows=2), prompt(20, rows=2), prompt(1, rows=2)):
            cached(model, cache, ids)
            assert held(cache) == cache.report.bytes_kept


def test_a_budget_in_bytes_is_a_ceiling() -> None:
    model = tiny("llama")
    with fewer.Cache(model, FAST, "40KB") as cache:
        cached(model, cache, prompt(240))
        assert 30_000 < cache.report.bytes_kept <= 40_000


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_of_one_is_snapkv_bit_for_bit(family: str) -> None:
    model, turns = tiny(family), (prompt(60), prompt(1), prompt(12), prompt(1))
    with fewer.Cache(model, FastKV(rate=1.0), 0.3) as fast, fewer.Cache(model, SnapKV(8, 7), 0.3) as snap:
        for got, want in zip(cached(model, fast, *turns), cached(model, snap, *turns), strict=True):
            assert torch.equal(got, want)
        assert [kept_positions(fast, i) for i in ours(fast)] == [kept_positions(snap, i) for i in ours(snap)]


def test_prompts_no_longer_than_the_window_go_on_whole() -> None:
    model = tiny("llama")
    with fewer.Cache(model, FastKV(rate=0.25), 1.0) as cache:
        outs = cached(model, cache, prompt(8), prompt(9), prompt(40))
        assert [int((~out.isnan().any(-1)).sum()) for out in outs] == [8, 8, 10]
        assert cache.report.layers[2].kept == ((26, 26),)


def test_a_packed_store_takes_what_goes_on() -> None:
    model = tiny("llama")
    with fewer.Cache(model, FAST, 0.3, store=KIVI(bits=4, group=16, residual=16).store[0]) as cache:
        out = cached(model, cache, prompt(100), prompt(1))[1]
        assert cache.report.layers[2].kept == ((31, 31),)
        assert bool(out.isfinite().all())


# --- batches, chunks, generate ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_is_the_row_alone(family: str, side: str) -> None:
    model = tiny(family)
    if family == "gemma3_text":  # its own sliding layers count padding between real tokens as tokens of the window
        side = "left"
    turns = [batch(FIRST, side, 10), batch([15, 15, 15] if family == "gemma3_text" else [15, 19, 12], "right", 20)]
    turns += [(prompt(1, rows=3, seed=seed), torch.ones(3, 1, dtype=torch.long)) for seed in (30, 31)]
    caches = [fewer.Cache(model, FAST, 0.25) for _ in range(4)]
    masks = [torch.zeros(3 if index == 0 else 1, 0, dtype=torch.long) for index in range(4)]
    for ids, real in turns:
        outs = []
        for index, cache in enumerate(caches):
            rows = slice(None) if index == 0 else slice(index - 1, index)
            wide = torch.ones(ids.shape[1], dtype=torch.bool) if index == 0 else real[rows][0].bool()
            masks[index] = torch.cat([masks[index], real[rows][:, wide]], 1)
            at = columns(masks[index])[:, -int(wide.sum()) :].clamp(min=0)
            call = {"attention_mask": masks[index], "position_ids": at, "past_key_values": cache}
            outs.append(model(ids[rows][:, wide], **call).logits)
        for row in range(3):
            got, want = outs[0][row, real[row].bool()], outs[row + 1][0]
            assert got.isnan().equal(want.isnan())
            assert_close(got.nan_to_num(), want.nan_to_num())
            for layer in ours(caches[0]):
                assert kept_positions(caches[0], layer)[row] == kept_positions(caches[row + 1], layer)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_left_padding_gives_each_row_its_own_answer(family: str) -> None:
    model = tiny(family)
    ids, real = batch(FIRST, "left", 10)
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with fewer.compress(model, FAST, keep=0.25) as run:
        together = model.generate(ids, attention_mask=real, **how)
        assert run.report.layers[ours(run.cache)[-1]].seen == (45, 32, 38)
        for row, length in enumerate(FIRST):
            alone = model.generate(ids[row : row + 1, -length:], **how)
            assert torch.equal(together.sequences[row, ids.shape[1] :], alone.sequences[0, length:])
            for got, want in zip(together.logits, alone.logits, strict=True):
                assert_close(got[row], want[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_generate_is_a_loop_over_single_tokens(family: str) -> None:
    model = tiny(family)
    with fewer.compress(model, FAST, keep=0.25):
        want = model.generate(prompt(40), **GREEDY)[0, 40:].tolist()
    with fewer.Cache(model, FAST, 0.25) as cache:
        said = [int(cached(model, cache, prompt(40), logits_to_keep=1)[0].argmax(-1))]
        while len(said) < 6:
            said.append(int(cached(model, cache, torch.tensor([said[-1:]]))[0].argmax(-1)))
    assert said == want


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_beams(family: str) -> None:
    """Beams reorder what every layer holds; one beam twice is the beam."""
    model = tiny(family)
    with fewer.compress(model, FAST, keep=0.25):
        rows = model.generate(prompt(40).repeat(2, 1), num_beams=3, **GREEDY)
        assert torch.equal(rows[0], model.generate(prompt(40), num_beams=3, **GREEDY)[0])
        assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_chunks_are_shortened_one_by_one(family: str) -> None:
    """`generate` in chunks is single forwards of these chunks."""
    model = tiny(family)
    chunked = model.generate(prompt(40), prefill_chunk_size=8, **GREEDY)
    if not torch.equal(chunked, model.generate(prompt(40), **GREEDY)):
        pytest.skip("this transformers gives every chunk the positions of the last one, with its own cache too (5.2.0)")
    ids, real = batch([40, 12, 33], "left", 10)
    with fewer.compress(model, FAST, keep=10) as run:
        together = model.generate(ids, attention_mask=real, prefill_chunk_size=8, **GREEDY)
        assert run.report.layers[ours(run.cache)[-1]].seen == (45, 17, 38)
        assert torch.equal(together[0, 40:], model.generate(ids[:1], prefill_chunk_size=8, **GREEDY)[0, 40:])
    with fewer.Cache(model, FAST, 10) as cache:
        *_, last = cached(model, cache, *torch.split(ids[:1], 8, dim=1))
        assert int(last[0, -1].argmax()) == int(together[0, 40])


def test_frozen_caches_read_everything() -> None:
    model = tiny("llama")
    with fewer.Cache(model, FAST, 0.25) as cache:
        cached(model, cache, prompt(40))
        cache.freeze()
        assert bool(cached(model, cache, prompt(20))[0].isfinite().all())
        assert cache.report.layers[2].kept == ((30, 30),)


def test_compressing_while_decoding() -> None:
    """At a fixed size from step to step; the prompt itself is shortened where it is compressed."""
    model = tiny("llama")
    for when, shown in (("both", 12), ("decode", 40)):
        with fewer.Cache(model, FAST, 20, when=when, every=2) as cache:
            assert int((~cached(model, cache, prompt(40))[0].isnan().any(-1)).sum()) == shown
            cached(model, cache, *[prompt(1, seed=s) for s in range(4)])
            assert {count for layer in cache.report.layers for count in layer.kept[0]} <= {16, 20}


# --- one model, several users ---


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model(family: str) -> None:
    model = tiny(family)
    with untouched(model, prompt(30)):
        with fewer.compress(model, FAST, keep=0.25):
            model(prompt(40))
            model.generate(prompt(30, rows=2), **GREEDY)
        with pytest.raises(RuntimeError), fewer.compress(model, FAST, keep=0.25):
            raise RuntimeError


def test_caches_that_decide_at_different_layers_live_side_by_side() -> None:
    model = tiny("llama", num_hidden_layers=4)
    methods = [FastKV(4, 3, layer, 0.3) for layer in (0, 2)]
    want = []
    for method in methods:
        with fewer.Cache(model, method, 0.25) as cache:
            want.append(cached(model, cache, prompt(40), prompt(1)))
    plain = model(prompt(40)).logits
    with fewer.Cache(model, methods[0], 0.25) as one, fewer.Cache(model, methods[1], 0.25) as two:
        for cache, logits in zip((one, two), want, strict=True):
            for a, b in zip(cached(model, cache, prompt(40), prompt(1)), logits, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()) and a.isnan().equal(b.isnan())
        assert torch.equal(model(prompt(40)).logits, plain)
        assert torch.equal(model(prompt(40), past_key_values=DynamicCache(config=model.config)).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_go_on_alike(family: str, tmp_path: Path) -> None:
    """Forks, deep copies and saved caches carry what is missing in later layers along."""
    model = tiny(family)
    cache = fewer.Cache(model, FAST, 0.25)
    cached(model, cache, prompt(40), prompt(1))
    cache.save(tmp_path / "cache")
    copies = [cache.fork(), copy.deepcopy(cache), fewer.Cache.load(model, tmp_path / "cache")]
    want = cached(model, cache, prompt(1, seed=1), prompt(1, seed=2))
    for other in copies:
        for got, wanted in zip(cached(model, other, prompt(1, seed=1), prompt(1, seed=2)), want, strict=True):
            assert torch.equal(got, wanted)


def test_a_sliding_layer_that_nobody_masks_says_no_number_rather_than_a_wrong_one() -> None:
    layer = Sliding(8)
    layer.passed = None
    layer.update(torch.full((1, 1, 3, 2), torch.nan), torch.zeros(1, 1, 3, 2))
    keys, _ = layer.update(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert bool((torch.ones(1, 1, 1, 2) @ keys.transpose(-1, -2)).isnan().any())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cropping_what_came_after_the_prompt(family: str) -> None:
    model = tiny(family, **({"sliding_window": 100} if family == "gemma3_text" else {}))
    with fewer.Cache(model, FAST, 0.25) as one, fewer.Cache(model, FAST, 0.25) as two:
        cached(model, one, prompt(40), *[prompt(1, seed=s) for s in range(3)])
        cached(model, two, prompt(40), prompt(1, seed=0))
        one.crop(-2)
        assert one.get_seq_length() == 41
        assert_close(cached(model, one, prompt(1, seed=5))[0], cached(model, two, prompt(1, seed=5))[0])


# --- what is refused ---


def test_losses_are_refused() -> None:
    model, ids = tiny("llama"), prompt(40)
    with fewer.Cache(model, FAST, 0.25) as cache:
        with pytest.raises(FewerError, match="labels: a loss is over all tokens"):
            model(ids, labels=ids, past_key_values=cache)
        assert cache.get_seq_length() == 0  # nothing was read
        assert model(ids, labels=ids).loss > 0  # a call without the cache is no business of ours
        assert bool(model(ids, logits_to_keep=4, past_key_values=cache).logits.isfinite().all())
    with fewer.compress(model, FAST, keep=0.25), pytest.raises(FewerError, match="labels"):
        model(ids, labels=ids)


def test_a_cache_that_was_read_already_is_refused() -> None:
    model = tiny("llama")
    with fewer.Cache(model, "full") as cache:
        cached(model, cache, prompt(40))
        with pytest.raises(FewerError, match="FastKV skips parts of a prompt while it is read"):
            cache.under(FAST, 0.25)


def test_a_released_cache_reads_no_prompt() -> None:
    """Another cache may keep the model attached, but not the hooks that shorten."""
    model = tiny("llama")
    with fewer.Cache(model, "full"):
        cache = fewer.Cache(model, FAST, 0.25)
        cached(model, cache, prompt(40))
        cache.release()
        assert bool(cached(model, cache, prompt(1))[0].isfinite().all())
        with pytest.raises(UnsupportedModel, match="layer 2 was given 40 tokens, and 12 of 40 go on"):
            cached(model, cache, prompt(40))


def test_a_layer_that_the_model_does_not_have() -> None:
    refused(tiny("llama"), FewerError, "layer=3: an index, or a fraction, of the 3 layers", FastKV(layer=3))


def test_decoder_layers_that_take_something_else() -> None:
    model = tiny("llama")
    own = model.model.layers[2].forward
    model.model.layers[2].forward = lambda *args, **kwargs: own(*args, **kwargs)
    refused(model, UnsupportedModel, "LlamaDecoderLayer of LlamaForCausalLM does not take hidden_states", FAST)
    refused(model, UnsupportedModel, "methods that only cut the cache can be used", FAST)


def test_arguments_that_cannot_be_cut_down() -> None:
    """As the three rows of positions that multimodal rotary embeddings come with."""
    model = tiny("llama")
    model.model.layers[2].register_forward_pre_hook(
        lambda m, args, kwargs: (args, {**kwargs, "position_ids": torch.zeros(3, 1, 40)}), with_kwargs=True
    )
    with fewer.Cache(model, FAST, 0.25) as cache, pytest.raises(UnsupportedModel, match="position_ids that have no"):
        cached(model, cache, prompt(40))


def test_a_model_without_rotary_positions() -> None:
    """Its positions are in the hidden states, so there is less to cut down."""
    from tests.adapters.test_hosts import gpt2

    model, sizes = gpt2(), []
    model.transformer.h[2].mlp.register_forward_hook(lambda m, args, out: sizes.append(args[0].shape[1]))
    with fewer.compress(model, FAST, keep=0.25) as run:
        model.generate(prompt(40), pad_token_id=0, **GREEDY)
        assert sizes[:2] == [12, 1]
        assert run.report.layers[2].kept == ((15, 15, 15, 15),)


def test_several_turns_keep_their_books() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, FAST, 0.25)
    for n in (40, 1, 30, 1):
        cached(model, cache, prompt(n))
    for layer in cache.report.layers:
        assert layer.seen == (72,)
    early, late = cache.report.layers[0], cache.report.layers[2]
    assert early.kept == ((19, 19),)  # a quarter of 71, and one more
    assert late.kept == ((19, 19),)
