"""Decoding steps that read what an earlier layer chose: the same as masking, over a cache that holds everything."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import fewer
from fewer.adapters.hf_read import read
from fewer.methods.kv.tidaldecode import TidalDecode
from fewer.types import FewerError, UnsupportedModel
from tests.adapters.common import FAMILIES, cached, held, refused, untouched
from tests.adapters.emulate import assert_close, columns, difference, ours
from tests.adapters.test_batches import batch, conversation
from tests.methods.kv.build import random_row
from tests.tiny import prompt, tiny

TIDAL = TidalDecode(top_k=6, start=1, correction=3)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
SIMULATED = "sparse_reference"


def deep(family: str, **changes: Any) -> Any:
    """A model of five layers with an unbounded cache."""
    if family != "gemma3_text":
        return tiny(family, num_hidden_layers=5, **changes)
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", *["full_attention"] * 3]
    return tiny(family, num_hidden_layers=7, layer_types=kinds, **changes)


class Simulation:
    """The textbook's attention over all keys, with those masked that a layer is not to read: the authors' simulation.

    `roles` says by layer what a step of one token does; `seen` counts, for each layer, the keys that are not masked.
    """

    def __init__(self, roles: dict[int, str], top_k: int) -> None:
        self.roles, self.top_k, self.choice = roles, top_k, torch.zeros(0)

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
        logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logits = logits + attention_mask
        role = self.roles.get(module.layer_idx, "all") if query.shape[2] == 1 else "all"
        if role == "choose":
            top = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).indices
            self.choice = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top, True)
        if role == "chosen":
            logits = logits.masked_fill(~self.choice, torch.finfo(logits.dtype).min)
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionMaskInterface.register(SIMULATED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


class Twin:
    """A model whose decoding reads sparsely, and the same model simulated."""

    def __init__(self, family: str, method: TidalDecode, attn: str = "sdpa", more: int = 0, **changes: Any) -> None:
        self.model, self.plain = (deep(family, attn=name, **changes) for name in (attn, SIMULATED))
        self.cache = fewer.Cache(self.model, method, 1.0)
        self.full = DynamicCache(config=self.plain.config)
        roles = {index: method.reads(place) for place, index in enumerate(ours(self.cache))}
        self.simulation = Simulation(roles, method.top_k + more)
        self.mask = torch.zeros(0)

    def step(self, ids: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        new = torch.ones_like(ids) if real is None else real
        self.mask = torch.cat([self.mask, new], 1) if self.mask.numel() else new
        call = {"attention_mask": self.mask, "position_ids": columns(self.mask)[:, -ids.shape[1] :].clamp(min=0)}
        got = self.model(ids, past_key_values=self.cache, **call).logits
        AttentionInterface.register(SIMULATED, self.simulation)
        want = self.plain(ids, past_key_values=self.full, **call).logits
        return got[new.bool()], want[new.bool()]


AttentionInterface.register(SIMULATED, Simulation({}, 1))  # models are made before a twin takes the name
TALK = [44, 1, 1, 1, 9, 1, 1]


@pytest.mark.parametrize("method", [TIDAL, TidalDecode(1, 0, 2), TidalDecode(20, 2, 9)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_less_equals_masking(family: str, method: TidalDecode) -> None:
    twin = Twin(family, method)
    for seed, n in enumerate(TALK):
        assert_close(*twin.step(prompt(n, seed=seed)))
    assert twin.cache.report.read < 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_never_read(family: str, side: str) -> None:
    twin = Twin(family, TIDAL)
    for ids, real in conversation(side):
        assert_close(*twin.step(ids, real))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_eager_hosts(family: str) -> None:
    twin = Twin(family, TIDAL, "eager")
    for ids, real in conversation("left"):
        assert_close(*twin.step(ids, real))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_key_more_is_noticed(family: str) -> None:
    """The comparison's own test."""
    twin = Twin(family, TIDAL, more=1)
    twin.step(prompt(44))
    assert difference(*twin.step(prompt(1))) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_less_matters_at_all(family: str) -> None:
    model = deep(family)
    with fewer.Cache(model, TIDAL) as cache:
        got = cached(model, cache, prompt(44), prompt(1))[1]
    want = cached(model, DynamicCache(config=model.config), prompt(44), prompt(1))[1]
    assert difference(got, want) > 1e-2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_choosing_as_many_as_there_are_is_the_host_bit_for_bit(family: str, attn: str) -> None:
    model, turns = deep(family, attn=attn), [prompt(n, seed=seed) for seed, n in enumerate(TALK)]
    want = cached(model, DynamicCache(config=model.config), *turns)
    with fewer.Cache(model, TidalDecode(top_k=58, start=1, correction=3)) as cache:
        assert all(torch.equal(a, b) for a, b in zip(cached(model, cache, *turns), want, strict=True))
        assert cache.report.read == 1.0
    with fewer.Cache(model, TidalDecode(top_k=57, start=1, correction=3)) as cache:  # of 58 at the last step
        *same, last = cached(model, cache, *turns)
        assert all(torch.equal(a, b) for a, b in zip(same, want[:-1], strict=True))
        assert not torch.equal(last, want[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_in_a_batch_is_the_row_alone(family: str) -> None:
    """Rows with fewer tokens than are chosen read all of theirs."""
    model, ids, real = deep(family), *batch([40, 4, 33], "left", 10)
    how = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with fewer.compress(model, TIDAL):
        together = model.generate(ids, attention_mask=real, **how)
        for row, length in enumerate([40, 4, 33]):
            alone = model.generate(ids[row : row + 1, -length:], **how)
            for got, want in zip(together.logits, alone.logits, strict=True):
                assert_close(got[row], want[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_several_tokens_at_once_read_everything(family: str) -> None:
    model, turns = deep(family), (prompt(30), prompt(9), prompt(2))
    with fewer.Cache(model, TIDAL) as cache:
        got = cached(model, cache, *turns)
        assert cache.report.read == 1.0
    want = cached(model, DynamicCache(config=model.config), *turns)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_generate_with_beams() -> None:
    model = deep("llama")
    with fewer.compress(model, TIDAL):
        rows = model.generate(prompt(40).repeat(2, 1), num_beams=3, **GREEDY)
        assert torch.equal(rows[0], model.generate(prompt(40), num_beams=3, **GREEDY)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(family: str) -> None:
    twin = Twin(family, TIDAL, dtype=torch.bfloat16)
    twin.step(prompt(44))
    got, _ = twin.step(prompt(1))
    assert got.dtype == torch.bfloat16 and bool(got.isfinite().all())


# --- what is read, and what the report says ---


class Place(SimpleNamespace):
    """As much of a cache layer as reading needs."""

    @classmethod
    def of(cls, method: TidalDecode, place: int, columns: int, chosen: Tensor | None = None) -> "Any":
        policy = SimpleNamespace(method=method)
        shared = SimpleNamespace(policy=policy, chosen=chosen)
        real, before = [columns - 1], columns - 1
        return cls(shared=shared, place=place, index=place, parts=(), length=before, real=real, reads=(0, 0))


def test_what_was_not_chosen_is_not_touched() -> None:
    """Keys and values elsewhere may be no numbers at all."""
    row, chosen = random_row(30), torch.tensor([[[[0, 7], [3, 29]], [[1, 2], [1, 28]]]])
    layer = Place.of(TidalDecode(2, 0, 0), 1, 30, chosen)
    plain = read(layer, row.query[None, :, -1:], row.keys[None], row.values[None], None, 8**-0.5, None)
    poison = torch.ones(1, 2, 30, dtype=torch.bool).scatter(2, chosen.flatten(2), False).unsqueeze(-1)
    keys, values = (part[None].masked_fill(poison, torch.nan) for part in (row.keys, row.values))
    out = read(layer, row.query[None, :, -1:], keys, values, None, 8**-0.5, None)
    assert out is not None and plain is not None and torch.equal(out, plain)


def test_the_authors_simulation_gives_the_same() -> None:
    """Golden: llama_tidal_attention_forward (DerrickYLJ/TidalDecode d67a1bd, src/tidal_build/modify_llama.py), top_k 6.

    Layers 2, 3, 9 and 10 on random_row(30, seed=layer), its last query times 3, without rotation or projections; the
    columns of each query head's choice, and the first feature of each head's output.
    """
    choices = {
        2: [[3, 10, 13, 17, 24, 26], [8, 11, 13, 17, 27, 29], [0, 5, 6, 17, 21, 25], [6, 10, 15, 21, 23, 28]],
        9: [[1, 3, 4, 5, 13, 15], [0, 1, 3, 6, 8, 11], [5, 9, 14, 19, 25, 28], [11, 16, 17, 19, 21, 26]],
    }
    outputs = {
        2: [0.34732, 0.60422, 0.50459, -0.26483],
        3: [-0.81413, -0.64411, -0.18093, 0.4109],
        9: [0.37024, 0.23795, 0.36556, 0.25059],
        10: [2.36922, 0.9853, 0.00652, 0.22533],
    }
    chosen = None
    for place, expected in outputs.items():
        row, layer = random_row(30, seed=place), Place.of(TidalDecode(top_k=6), place, 30, chosen)
        out = read(layer, row.query[None, :, -1:] * 3, row.keys[None], row.values[None], None, 8**-0.5, None)
        assert out is not None
        torch.testing.assert_close(out[0, 0, :, 0], torch.tensor(expected), atol=1e-5, rtol=1e-4)
        chosen = layer.shared.chosen
        if place in choices:
            assert chosen.flatten(1, 2)[0].sort().values.tolist() == choices[place]


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_are_saved_and_bytes_are_not(family: str) -> None:
    """Two steps on 44 tokens: 45 and 46 entries. Of five layers three read all, two read 6 of them."""
    model = deep(family)
    with fewer.Cache(model, TIDAL) as cache:
        cached(model, cache, prompt(44))
        assert cache.report.read == 1.0
        cached(model, cache, prompt(1), prompt(1, seed=1))
        report = cache.report
        sparse = [ours(cache)[place] for place in (2, 4)]
        assert [layer.read for layer in report.layers] == [
            12 / 91 if index in sparse else 1.0 for index in range(len(report.layers))
        ]
        assert report.read == pytest.approx((3 + 2 * 12 / 91) / 5)
        assert report.bytes_kept == report.bytes_full == held(cache) and report.kept == 1.0
        assert "decoding steps read 65.3% of the entries" in str(report)
        data = json.loads(json.dumps(report.to_dict()))
        assert data["read"] == report.read and data["layers"][sparse[0]]["read"] == 12 / 91
        assert cache.shared.chosen is None  # nothing of a step is held on to


def test_short_rows_are_read_whole() -> None:
    """Rows of 3 and 20 tokens and one more: 4 + 6 of 4 + 21 entries."""
    model = deep("llama")
    ids, real = batch([3, 20], "left", 10)
    with fewer.Cache(model, TIDAL) as cache:
        model(ids, attention_mask=real, past_key_values=cache)
        model(prompt(1, rows=2), attention_mask=torch.cat([real, real[:, -1:]], 1), past_key_values=cache)
        assert cache.report.layers[2].read == 10 / 25


def test_others_read_everything() -> None:
    model = deep("llama")
    with fewer.Cache(model, "knorm", 0.5) as cache:
        cached(model, cache, prompt(40), prompt(1))
        assert cache.report.read == 1.0 and "decoding steps read" not in str(cache.report)


# --- copies, and what is refused ---


def test_a_cache_read_by_another_method_is_read_sparsely_from_then_on() -> None:
    model, steps = deep("llama"), (prompt(1, seed=1), prompt(1, seed=2))
    with fewer.Cache(model, "full") as full, fewer.Cache(model, TIDAL) as own:
        cached(model, full, prompt(44)), cached(model, own, prompt(44))
        copies = [full.under(TIDAL, 1.0), own.fork()]
        want = cached(model, own, *steps)
        for other in copies:
            assert all(torch.equal(a, b) for a, b in zip(cached(model, other, *steps), want, strict=True))
            assert other.report.read == own.report.read < 1


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model(family: str) -> None:
    model = deep(family)
    with untouched(model, prompt(30)), fewer.compress(model, TIDAL):
        model.generate(prompt(30, rows=2), **GREEDY)


def test_budgets_and_stores_are_refused() -> None:
    model = deep("llama")
    refused(model, FewerError, "keep=0.5: TidalDecode keeps every token", TIDAL)
    refused(model, FewerError, "TidalDecode reads chosen entries", TIDAL, keep=1.0, store="kivi-4bit")


def test_caches_that_lost_tokens_are_refused() -> None:
    model = deep("llama")
    with fewer.Cache(model, "knorm", 0.5) as cache:
        cached(model, cache, prompt(40))
        with pytest.raises(UnsupportedModel, match="layer 0 holds packed tokens, and TidalDecode"):
            cached(model, cache.under(TIDAL, 1.0), prompt(1))


def test_training_is_refused() -> None:
    model = deep("llama", attention_dropout=0.1).train()
    with fewer.Cache(model, TIDAL) as cache, pytest.raises(FewerError, match=r"call model\.eval\(\) first"):
        cached(model, cache, prompt(40), prompt(1))


@pytest.mark.parametrize("layers", [2, 3])
def test_models_too_shallow_to_choose_are_refused(layers: int) -> None:
    """With start=2 no layer is left to read what layer 2 would choose."""
    refused(tiny("llama", num_hidden_layers=layers), FewerError, f"this model has {layers} layers", "tidaldecode", 1.0)
    with fewer.compress(tiny("llama", num_hidden_layers=layers), TidalDecode(top_k=6, start=0, correction=0)):
        pass


def test_rows_that_read_less_are_not_stacked() -> None:
    """In a batch they would read everything, and say nothing of it."""
    model = deep("llama")
    with fewer.Cache(model, "full", 1.0) as cache:
        cached(model, cache, prompt(40))
        with pytest.raises(FewerError, match="stack: TidalDecode reads part of what it holds"):
            fewer.Cache.stack([cache.fork(), cache.under(TIDAL, 1.0)])
