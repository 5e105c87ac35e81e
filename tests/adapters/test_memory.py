"""Freed memory: the process lets go of what was dropped, and the report counts what is held to the byte."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.pyramidkv import PyramidKV
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.types import BudgetError, Tokens
from tests.adapters.common import ADA, FAMILIES, MORE_METHODS, PAIRS, SNAP, cached, held, newborn, tensors_in, turns
from tests.adapters.emulate import ours
from tests.tiny import prompt, tiny

N = 240


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_the_process_holds_what_the_report_says(family: str, method: str) -> None:
    model = tiny(family)
    model(prompt(N))  # whatever the host makes once is there now
    with newborn(model) as alive, fewer.Cache(model, MORE_METHODS[method], keep=0.25) as cache:
        cached(model, cache, prompt(N))
        report = cache.report
        mine = [report.layers[i] for i in ours(cache)]
        full = sum(layer.bytes_full for layer in mine)
        rounding = 0.1 if method == "pyramidkv" else 0
        assert sum(layer.bytes_kept - layer.metadata for layer in mine) == pytest.approx(full / 4, rel=rounding)
        assert sum(layer.metadata for layer in mine) <= 0.07 * full
        assert held(cache) == report.bytes_kept
        windows = 8 * sum(layer.state == "left alone" for layer in report.layers)  # each knows its own length
        assert sum(alive().values()) == report.bytes_kept + windows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_measure_sees_a_cache_that_keeps_everything(family: str) -> None:
    model = tiny(family)
    model(prompt(N))
    with newborn(model) as alive, fewer.Cache(model, SNAP, keep=1.0) as cache:
        cached(model, cache, prompt(N))
        full = sum(cache.report.layers[i].bytes_full for i in ours(cache))
        assert sum(alive().values()) >= full >= 3 * N * 32 * 8 * (2 if family == "gpt_neox" else 2 / 3)


@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
@pytest.mark.parametrize("method", MORE_METHODS)
def test_bytes_reported_are_bytes_held_at_every_step(method: str, when: Any) -> None:
    model = tiny("llama")
    with fewer.Cache(model, MORE_METHODS[method], keep=0.5, when=when, every=2) as cache:
        for ids in (*turns(), *turns(30)):
            cached(model, cache, ids)
            assert held(cache) == cache.report.bytes_kept


@pytest.mark.parametrize("method", MORE_METHODS)
def test_bytes_reported_are_bytes_held_with_padding(method: str) -> None:
    model = tiny("llama")
    real = torch.ones(2, 40, dtype=torch.long)
    real[0, :9] = 0
    with fewer.Cache(model, MORE_METHODS[method], keep=0.5) as cache:
        model(prompt(40, rows=2), attention_mask=real, past_key_values=cache)
        assert held(cache) == cache.report.bytes_kept
        real = torch.cat([real, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(prompt(1, rows=2), attention_mask=real, past_key_values=cache)
        assert held(cache) == cache.report.bytes_kept


@pytest.mark.parametrize("method", [SNAP, ADA, StreamingLLM()], ids=["snapkv", "adakv", "streaming-llm"])
def test_nothing_kept_is_a_view_of_something_larger(method: Any) -> None:
    model = tiny("llama")
    with fewer.Cache(model, method, keep=0.25) as cache:
        cached(model, cache, *turns())
        for tensor in tensors_in(cache):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_nothing_kept_holds_on_to_a_graph() -> None:
    """A plain call outside `no_grad` frees too: a kept key must not keep the forward that made it."""
    model = tiny("llama")
    with torch.enable_grad(), fewer.Cache(model, SNAP, keep=0.25) as cache:
        cached(model, cache, prompt(40))
        assert not any(tensor.requires_grad for tensor in tensors_in(cache))


@pytest.mark.parametrize(("method", "keep"), [("adakv", 0.25), ("h2o", 0.25), ("adakv", 1.0)])
def test_the_peak_holds_one_layer_whole(method: str, keep: float) -> None:
    """While layer after layer is filled, tensors as large as a layer's keys do not become more, unless all stays."""
    model = tiny("llama", num_hidden_layers=5)
    size, counts = N * 32 * 4, []
    with newborn(model) as alive, fewer.Cache(model, MORE_METHODS[method], keep=keep) as cache:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: counts.append(sum(n == size for n in alive().values())))
        cached(model, cache, prompt(N))
    if keep < 1:
        assert counts == counts[:1] * 5
    else:
        assert counts[-1] - counts[0] == 8  # keys and values of four layers more


def test_while_a_layer_is_compressed_only_that_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import fewer.adapters.hf_decide as hf_decide

    model, step, sizes = tiny("llama", num_hidden_layers=5), hf_decide.settle, []

    def watched(*args: Any) -> Any:
        sizes.append([layer.keys.shape[2] if layer.is_initialized else 0 for layer in cache.layers])
        return step(*args)

    monkeypatch.setattr(hf_decide, "settle", watched)
    with fewer.Cache(model, ADA, keep=0.25) as cache:
        cached(model, cache, prompt(N))
    assert [sum(size == N for size in row) for row in sizes] == [1] * 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [SNAP, ADA, H2O(), StreamingLLM()], ids=["snapkv", "adakv", "h2o", "streaming-llm"])
def test_a_budget_in_bytes_is_a_ceiling(family: str, method: Any) -> None:
    model = tiny(family)
    with fewer.Cache(model, method, keep="20KB") as cache:
        cached(model, cache, prompt(N))
        mine = [cache.report.layers[i] for i in ours(cache)]
        one = sum(layer.bytes_kept / layer.kept[0][0] for layer in mine) if method is not ADA else 1000
        assert 20_000 - one <= sum(layer.bytes_kept for layer in mine) <= 20_000


def test_a_budget_in_bytes_is_for_the_layers_that_are_compressed() -> None:
    """Sliding-window layers bound themselves; what they hold stands beside it in the report."""
    model = tiny("gemma3_text")
    with fewer.Cache(model, SNAP, keep="20KB") as cache:
        cached(model, cache, prompt(N))
        layers = cache.report.layers
        assert 19_000 <= sum(layer.bytes_kept for layer in layers if layer.state == "compressed") <= 20_000
        assert all(layer.bytes_kept == layer.bytes_full > 0 for layer in layers if layer.state == "left alone")


@dataclass(frozen=True)
class OneHead(H2O):
    """Heavy hitters, and the first head's are worth far more than the others'."""

    def score(self, tokens: Tokens) -> Tensor:
        first = torch.arange(tokens.positions.shape[1]).view(-1, 1) == 0
        return super().score(tokens) + 1e3 * first


def test_a_budget_in_bytes_covers_the_scores_of_uneven_heads() -> None:
    """Scores that live on with the keys are counted with them, however unevenly the heads share."""
    model = tiny("gpt_neox")
    with fewer.Cache(model, AdaKV(OneHead(), floor=0.1), keep="20KB") as cache:
        cached(model, cache, prompt(N))
        counts = cache.report.layers[0].kept[0]
        assert max(counts) > 3 * min(counts)
        assert held(cache) == cache.report.bytes_kept <= 20_000


@pytest.mark.parametrize("when", ["both", "decode"])
@pytest.mark.parametrize("name", ["snapkv", "expected-attention", "tova", "h2o"])
def test_a_budget_in_bytes_covers_signals_that_wait_for_decoding(name: str, when: str) -> None:
    """Windows of queries, and their moments, are held on beside the tokens; each time a cache is cut they count."""
    model, one = tiny("llama"), 3 * 2 * (2 * 16 * 4 + 8)
    with fewer.Cache(model, MORE_METHODS[name], keep="60KB", when=when, every=3) as cache:
        cached(model, cache, prompt(N))
        if when == "both":
            assert 60_000 - one <= cache.report.bytes_kept <= 60_000
        for cut in range(1, 4):
            cached(model, cache, *(prompt(1, seed=3 * cut + step) for step in range(3)))
            assert held(cache) == cache.report.bytes_kept and 60_000 - one <= cache.report.bytes_kept <= 60_000
        assert cache.report.metadata > 0


def test_bytes_that_signals_alone_would_fill_are_refused() -> None:
    model = tiny("llama")
    with (
        fewer.Cache(model, SNAP, keep="6KB", when="both") as cache,
        pytest.raises(BudgetError, match=r"bytes that a single token takes in this cache \(all .* beside tokens\)"),
    ):
        cached(model, cache, prompt(N))


@pytest.mark.filterwarnings("ignore:.*leaves next to no room")
@pytest.mark.parametrize("size", [45_000, 60_000, 62_000])
@pytest.mark.parametrize("name", ["knorm", "adakv", "kvzip"])
def test_a_budget_in_bytes_covers_what_each_chunk_is_packed_with(name: str, size: int) -> None:
    """GEAR's corrections are one for each head and forward."""
    model = tiny("llama")
    with fewer.Cache(model, name, keep=f"{size}B", store=GEAR(group=8, block=16, rank=4)) as cache:
        for start in range(0, 384, 128):
            cached(model, cache, prompt(384)[:, start : start + 128])
            assert held(cache) == cache.report.bytes_kept <= size
        assert cache.report.bytes_kept > 0.9 * size


def test_a_budget_in_bytes_is_shared_by_the_rows() -> None:
    model = tiny("llama")
    with fewer.Cache(model, SNAP, keep="20KB") as cache:
        cached(model, cache, prompt(N, rows=3))
        assert 19_000 <= cache.report.bytes_kept <= 20_000
        assert len(set(cache.report.layers[0].kept)) == 1


BLOCKS = KIVI(bits=4, group=8, residual=16)


@pytest.mark.parametrize("size", [20_000, 30_000, 45_000, 60_000])
@pytest.mark.parametrize("name", ["knorm", "pyramidkv", "adakv", "kvzip", "random"])
def test_a_budget_in_bytes_is_filled_where_blocks_are_packed(name: str, size: int) -> None:
    """Blocks of 16: what waits for its block to fill takes seven times the bytes, and bytes are a ceiling all the same,
    however heads and layers share. Where all heads hold as many, one token more would be too much, or a block less."""
    model = tiny("llama")
    method: Any = {"adakv": AdaKV(OneHead(), floor=0.1), "pyramidkv": PyramidKV(window=8)}.get(name, name)
    with fewer.Cache(model, method, f"{size}B", store=BLOCKS) as cache:
        cached(model, cache, prompt(N, rows=2))
        counts = [count for layer in cache.report.layers for row in layer.kept for count in row]
        assert held(cache) == cache.report.bytes_kept <= size
        assert cache.report.bytes_kept > 0.7 * size or min(counts) == N
    if len(set(counts)) == 1 and counts[0] < N:
        with fewer.Cache(model, method, counts[0] + 1, store=BLOCKS) as more:
            cached(model, more, prompt(N, rows=2))
            assert more.report.bytes_kept > size


def test_blocks_that_fill_leave_room_for_a_window() -> None:
    """A window that would be too much if all of its last block waited."""
    model, snap = tiny("llama"), SnapKV(window=32)
    with fewer.Cache(model, snap, "10KB", store=BLOCKS) as cache:
        cached(model, cache, prompt(N))
        assert min(cache.report.layers[0].kept[0]) >= 32 and cache.report.bytes_kept <= 10_000
