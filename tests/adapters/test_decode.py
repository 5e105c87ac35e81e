"""Compression while decoding: every n steps back to the budget, and never more than n above it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.tova import TOVA
from tests.adapters.common import ADA, FAMILIES, METHODS, MORE_METHODS, PAIRS, SNAP, cached
from tests.adapters.emulate import Twin, difference, kept_positions, ours
from tests.tiny import prompt, tiny

METHODS_IDS = [SNAP, ADA, H2O(), TOVA(), StreamingLLM(positions="original")]
NAMES = ["snapkv", "adakv", "h2o", "tova", "streaming-llm"]


def sizes(cache: Any, per_head: bool = True) -> set[float]:
    """Entries a head, on average over a row's heads."""
    return {sum(row) / len(row) for index in ours(cache) for row in cache.report.layers[index].kept}


def after_each_step(model: Any, cache: Any, steps: int, first: int = 30) -> list[set[float]]:
    """How many entries a head has after the prompt and after each single token."""
    out = []
    for step in range(steps + 1):
        cached(model, cache, prompt(first if step == 0 else 1, seed=step))
        out.append(sizes(cache))
    return out


EVEN = [(family, method) for family, method in PAIRS if method != "pyramidkv"]  # whose layers differ by design


@pytest.mark.parametrize(("family", "method"), EVEN)
def test_decode_leaves_the_prompt_whole_and_then_holds_the_budget(family: str, method: str) -> None:
    model = tiny(family)
    cache = fewer.Cache(model, MORE_METHODS[method], 20, when="decode", every=4)
    got = after_each_step(model, cache, 10)
    assert got == [{n} for n in (30, 31, 32, 33, 20, 21, 22, 23, 20, 21, 22)]


@pytest.mark.parametrize(("family", "method"), EVEN)
def test_both_holds_the_budget_from_the_prompt_on(family: str, method: str) -> None:
    model = tiny(family)
    cache = fewer.Cache(model, MORE_METHODS[method], 16, when="both", every=3)
    got = after_each_step(model, cache, 8)
    assert got == [{n} for n in (16, 17, 18, 16, 17, 18, 16, 17, 18)]


def layer_sizes(cache: Any) -> list[int]:
    return [layer.kept[0][0] for layer in cache.report.layers]


def test_a_pyramid_holds_its_total_while_decoding() -> None:
    """Layers that were left different numbers must still agree on who gets what."""
    model = tiny("llama")
    cache = fewer.Cache(model, MORE_METHODS["pyramidkv"], 16, when="both", every=3)
    for step in range(13):
        cached(model, cache, prompt(30 if step == 0 else 1, seed=step))
        assert sum(layer_sizes(cache)) == 3 * (16 + step % 3)
        assert layer_sizes(cache) == sorted(layer_sizes(cache), reverse=True)


def test_a_pyramid_holds_its_total_over_turns() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, MORE_METHODS["pyramidkv"], 0.25)
    for turn in range(5):
        cached(model, cache, prompt(40, seed=turn))
        assert sum(layer_sizes(cache)) == 3 * 10 * (turn + 1)


def test_prefill_never_compresses_while_decoding() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, SNAP, 16, when="prefill", every=2)
    assert after_each_step(model, cache, 5) == [{n} for n in (16, 17, 18, 19, 20, 21)]


def test_a_new_turn_starts_the_count_anew() -> None:
    model, got = tiny("llama"), []
    cache = fewer.Cache(model, SNAP, 16, when="both", every=3)
    for n in (30, 1, 1, 5, 1, 1, 1):
        cached(model, cache, prompt(n, seed=n))
        got.append(sizes(cache))
    assert got == [{n} for n in (16, 17, 18, 16, 17, 18, 16)]


def test_decode_alone_leaves_a_second_turn_whole() -> None:
    model, got = tiny("llama"), []
    cache = fewer.Cache(model, SNAP, 16, when="decode", every=2)
    for n in (30, 1, 1, 5, 1, 1):
        cached(model, cache, prompt(n, seed=n))
        got.append(sizes(cache))
    assert got[:4] == [{n} for n in (30, 31, 16, 21)]
    assert max(got[-1]) <= 18


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, METHODS["knorm"], 4, when="decode", every=2)
    assert after_each_step(model, cache, 8, first=1) == [{n} for n in (1, 2, 3, 4, 4, 5, 4, 5, 4)]


def test_a_fraction_follows_what_was_seen() -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, METHODS["knorm"], 0.5, when="both", every=2)
    got = after_each_step(model, cache, 6)
    assert got == [{n} for n in (15, 16, 16, 17, 17, 18, 18)]
    assert cache.report.layers[0].asked == (18,)


@pytest.mark.parametrize("when", ["decode", "both"])
@pytest.mark.parametrize("every", [1, 4])
def test_generate_never_goes_above(every: int, when: Any) -> None:
    model, budget, most = tiny("llama"), 12, []
    with fewer.compress(model, ADA, keep=budget, when=when, every=every) as run:
        handle = model.register_forward_hook(lambda *_: most.append(max(sizes(run.cache))))
        model.generate(prompt(30), max_new_tokens=14, do_sample=False)
        handle.remove()
    settled = most[every:] if when == "decode" else most
    assert max(settled) <= budget + every - 1  # one more while the next token is being read
    assert min(settled) == budget


@pytest.mark.parametrize("method", METHODS_IDS, ids=NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_while_decoding_equals_masking(family: str, method: Any) -> None:
    twin = Twin(family, method, 14, when="both", every=2)
    for seed, n in enumerate([30, *[1] * 5, 4, 1]):
        assert difference(*twin.step(prompt(n, seed=seed))) <= 1e-4


@pytest.mark.parametrize(("family", "when"), [("llama", "decode"), *((family, "both") for family in FAMILIES)])
def test_sinks_turn_on_with_the_window(family: str, when: Any) -> None:
    """Evicting after every token turns the sinks again and again; they must end where one turn would bring them."""
    twin = Twin(family, StreamingLLM(), 12, sinks=4, when=when, every=1)
    for seed, n in enumerate([30, *[1] * 7]):
        assert difference(*twin.step(prompt(n, seed=seed))) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_h2o_at_every_token_is_the_naive_loop(family: str) -> None:
    """Scores accumulate over every query since the start and move with the keys that stay."""
    twin = Twin(family, H2O(), 12, when="both", every=1)
    naive: dict[int, Tensor] = {}  # (heads of keys, columns), summed
    for seed, n in enumerate([30, *[1] * 8]):
        assert difference(*twin.step(prompt(n, seed=seed))) <= 1e-4
        length = twin.cache.get_seq_length()
        for index in ours(twin.cache):
            weights = twin.weights[index][0]  # (heads, q, columns), as the emulation attended
            positions = kept_positions(twin.cache, index)[0]
            h = len(positions)
            new = weights.sum(1).view(h, -1, length).sum(1)
            if index in naive:
                new[:, : naive[index].shape[1]] += naive[index]
            best = new.clone()
            best[:, length - 6 :] = torch.inf  # half of the budget is recent
            for head in range(h):
                want = best[head].topk(12).indices.sort().values.tolist()
                assert positions[head] == want
                gone = torch.ones(length, dtype=torch.bool)
                gone[want] = False
                new[head, gone] = -torch.inf
            naive[index] = new
        assert sizes(twin.cache) == {12}


def test_a_window_method_sees_the_queries_of_decoding() -> None:
    """TOVA at every token keeps what the last query attended to most."""
    twin = Twin("llama", TOVA(), 12, when="both", every=1)
    for seed, n in enumerate([30, *[1] * 6]):
        length = twin.cache.get_seq_length()
        twin.step(prompt(n, seed=seed))
        for index in ours(twin.cache):
            last = twin.weights[index][0, :, -1].mean(0)  # (columns,)
            want = last.topk(12).indices.sort().values.tolist()
            assert kept_positions(twin.cache, index)[0] == [want, want]
    assert length == 35
