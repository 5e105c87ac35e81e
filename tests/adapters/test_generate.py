"""`generate`, unchanged: greedy, sampled, by beams, in chunks, in turns; and `fewer.Cache` beside `compress`."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

import fewer
from tests.adapters.common import ADA, FAMILIES, METHODS, MORE_METHODS, SNAP, cached, held
from tests.adapters.emulate import assert_close, kept_positions, ours
from tests.tiny import prompt, tiny

GREEDY = {"max_new_tokens": 8, "do_sample": False}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}
SAMPLED = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_k": 20}
BEAMS = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}


def by_hand(model: Any, cache: Any, ids: Tensor, tokens: int) -> Tensor:
    """Greedy decoding without `generate`."""
    logits = cached(model, cache, ids)[0]
    for _ in range(tokens):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        if ids.shape[1] > cache.get_seq_length() + 1:
            raise AssertionError("one token at a time")
        logits = cached(model, cache, ids[:, -1:])[0]
    return ids


def everything_kept(cache: Any) -> list[Any]:
    return [kept_positions(cache, index) for index in ours(cache)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["adakv", "streaming-llm in cache"])
def test_greedy_is_the_loop_by_hand(family: str, method: str) -> None:
    model = tiny(family)
    with fewer.compress(model, MORE_METHODS[method], keep=0.25) as run:
        got = model.generate(prompt(40), **GREEDY)
    with fewer.Cache(model, MORE_METHODS[method], keep=0.25) as cache:
        want = by_hand(model, cache, prompt(40), 8)
    assert torch.equal(got, want)
    assert everything_kept(run.cache) == everything_kept(cache)
    assert run.report.layers[-1].kept == tuple(tuple(k - 1 for k in row) for row in cache.report.layers[-1].kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_a_seed(family: str) -> None:
    model = tiny(family)

    def sample() -> Tensor:
        torch.manual_seed(5)
        return model.generate(prompt(40), **SAMPLED)

    want = sample()
    with fewer.compress(model, SNAP, keep=1.0):
        assert torch.equal(sample(), want)
    with fewer.compress(model, SNAP, keep=0.25):
        first = sample()
        assert torch.equal(sample(), first)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_the_whole_cache_are_the_hosts_own(family: str) -> None:
    model = tiny(family)
    how = {**BEAMS, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    want = model.generate(prompt(40, rows=2), **how)
    with fewer.compress(model, "knorm", keep=1.0):
        got = model.generate(prompt(40, rows=2), **how)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.sequences_scores, want.sequences_scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o"])
def test_beams_compress(family: str, method: str) -> None:
    """Each beam's score is the sum of what the compressed model gives its tokens, so the cache followed the beams."""
    model = tiny(family)
    how = {**BEAMS, "length_penalty": 0.0, "output_scores": True, "return_dict_in_generate": True}
    with fewer.compress(model, METHODS[method], keep=0.5) as run:
        out = model.generate(prompt(40), **how)
        for index in ours(run.cache):
            layer = run.report.layers[index]
            assert len(layer.kept) == 3
            assert all(sum(row) == len(row) * (20 + 7) for row in layer.kept)  # the last token was not read
        assert held(run.cache) == run.report.bytes_kept
    with fewer.Cache(model, METHODS[method], keep=0.5) as cache:
        total = 0.0
        logits = cached(model, cache, prompt(40))[0]
        for token in out.sequences[0, 40:].tolist():
            total += float(logits[0, -1].log_softmax(-1)[token])
            logits = cached(model, cache, torch.tensor([[token]]))[0]
    assert float(out.sequences_scores[0]) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("method", MORE_METHODS)
def test_chunks_are_bounded(method: str) -> None:
    """While the prompt comes in chunks, a head never holds more than its share of what was seen and one chunk."""
    model, chunk, keep, seen = tiny("llama"), 16, 0.25, []
    with fewer.compress(model, MORE_METHODS[method], keep=keep) as run:
        handles = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, *_: run.cache and seen.append(run.report.layers[module.layer_idx])
            )
            for layer in model.model.layers
        ]
        after = []
        handles.append(model.register_forward_hook(lambda *_: after.append(run.report)))
        model.generate(prompt(90), max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk)
        for handle in handles:
            handle.remove()
    assert [report.layers[0].seen for report in after] == [(16,), (32,), (48,), (64,), (80,), (90,)]
    room = 2 if method == "pyramidkv" else 1
    for layer in [*seen, *(layer for report in after for layer in report.layers)]:
        for row, count in zip(layer.kept, layer.seen, strict=True):
            share = max(math.ceil(keep * count), 8)  # windows of 8 are not split
            assert sum(row) <= room * len(row) * share


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_turns(family: str) -> None:
    """Each chunk is a turn. The calls are repeated as `generate` made them: 5.2.0 counts positions wrongly there."""
    model, calls = tiny(family), []
    with fewer.compress(model, ADA, keep=0.25) as run:
        handle = model.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
        out = model.generate(prompt(70), prefill_chunk_size=32, **GREEDY, **LOGITS)
        handle.remove()
    assert [call["input_ids"].shape[1] for call in calls] == [32, 32, 6, *[1] * 7]
    with fewer.Cache(model, ADA, keep=0.25) as cache:
        got = [model(**{**call, "past_key_values": cache}).logits[:, -1] for call in calls]
    for mine, theirs in zip(got[2:], out.logits, strict=True):
        assert torch.equal(mine, theirs)
    assert everything_kept(run.cache) == everything_kept(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_the_whole_cache_are_the_hosts_own(family: str) -> None:
    model = tiny(family)
    want = model.generate(prompt(70), prefill_chunk_size=32, **GREEDY)
    with fewer.compress(model, ADA, keep=1.0):
        assert torch.equal(model.generate(prompt(70), prefill_chunk_size=32, **GREEDY), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_turns_on_one_cache(family: str) -> None:
    model = tiny(family)
    with fewer.compress(model, ADA, keep=0.5) as run:
        first = model.generate(prompt(30), return_dict_in_generate=True, **GREEDY)
        both = torch.cat([first.sequences, prompt(9, seed=1)], dim=1)
        second = model.generate(both, past_key_values=first.past_key_values, **GREEDY)
        assert run.cache is first.past_key_values
        assert run.report.layers[ours(run.cache)[0]].seen == (second.shape[1] - 1,)
    with fewer.Cache(model, ADA, keep=0.5) as cache:
        mine = model.generate(prompt(30), past_key_values=cache, **GREEDY)
        assert torch.equal(mine, first.sequences)
        # generate has not read its last token; the next turn brings it
        want = by_hand(model, cache, both[:, 37:], 8)
    assert torch.equal(second[:, both.shape[1] :], want[:, 10:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_by_hand_is_the_context(family: str) -> None:
    model = tiny(family)
    with fewer.compress(model, ADA, keep=0.25) as run:
        inside = model.generate(prompt(40), **GREEDY)
    cache = fewer.Cache(model, ADA, keep=0.25)
    assert torch.equal(model.generate(prompt(40), past_key_values=cache, **GREEDY), inside)
    assert everything_kept(cache) == everything_kept(run.cache)
    with fewer.compress(model, ADA, keep=0.25):
        plain = model(prompt(40))
    mine = fewer.Cache(model, ADA, keep=0.25)
    assert torch.equal(model(prompt(40), past_key_values=mine).logits, plain.logits)
    assert everything_kept(mine) == everything_kept(plain.past_key_values)


def test_every_plain_call_without_a_cache_gets_a_new_one() -> None:
    model = tiny("llama")
    with fewer.compress(model, "knorm", keep=0.5) as run:
        first = model(prompt(30)).past_key_values
        second = model(prompt(20)).past_key_values
    assert first is not second
    assert run.cache is second
    assert first.get_seq_length() == 30 and second.get_seq_length() == 20


def test_inputs_embeds_work_as_ids_do() -> None:
    model = tiny("llama")
    with fewer.compress(model, ADA, keep=0.25) as run:
        want, kept = model(prompt(40)).logits, everything_kept(run.cache)
        got = model(inputs_embeds=model.get_input_embeddings()(prompt(40))).logits
        assert torch.equal(got, want)
        assert everything_kept(run.cache) == kept


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # gemma's sliding windows are full after a few tokens
def test_prompt_lookup_crops_what_was_guessed_wrong(family: str) -> None:
    """Assisted decoding reads guesses several at a time and crops the wrong ones away again."""
    if family == "gemma3_text" and not hasattr(cache_utils.Cache, "activate_past_recording"):
        pytest.skip("this transformers does not crop full sliding windows")
    model = tiny(family, eos_token_id=1)
    ids = prompt(20).repeat(1, 3)
    how = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    want = model.generate(ids, **how)
    with fewer.compress(model, SNAP, keep=1.0):
        assert torch.equal(model.generate(ids, **how), want)
    with fewer.compress(model, SNAP, keep=0.5) as run:
        out = model.generate(ids, **how)
        assert run.cache is not None and run.cache.get_seq_length() in (out.shape[1] - 1, out.shape[1])


@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_budget_in_tokens_holds_through_generate(how: dict[str, Any]) -> None:
    model = tiny("qwen3")
    with fewer.compress(model, SNAP, keep=12) as run:
        model.generate(prompt(40), **how)
        assert {count for layer in run.report.layers for row in layer.kept for count in row} == {12 + 7}
    assert_close(torch.tensor(run.report.kept), torch.tensor(19 / 47))
