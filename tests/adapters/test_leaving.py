"""Leaving restores the model bit for bit: after use, an exception, or a cache's death; and two users get along."""

import copy
import gc
from typing import Any

import pytest
import torch

import fewer
from tests.adapters.common import ADA, FAMILIES, METHODS, MORE_METHODS, PAIRS, SNAP, cached, state, turns, untouched
from tests.adapters.emulate import kept_positions, ours
from tests.tiny import prompt, tiny


class Oops(RuntimeError):
    """Raised on purpose."""


def fail(*_: Any) -> None:
    raise Oops


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_after_use(family: str, method: str, attn: str) -> None:
    model = tiny(family, attn=attn)
    with untouched(model, prompt(30)):
        with fewer.compress(model, MORE_METHODS[method], keep=0.25):
            model(prompt(40))
            model.generate(prompt(30, rows=2), max_new_tokens=3, do_sample=False)
        assert model.config._attn_implementation == attn


@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_exception_in_the_context(family: str) -> None:
    model = tiny(family)
    with untouched(model, prompt(30)):
        with pytest.raises(Oops), fewer.compress(model, SNAP, keep=0.25):
            fail(model(prompt(40)))
        with fewer.compress(model, SNAP, keep=0.25):
            model(prompt(40))


@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_exception_inside_the_model(family: str) -> None:
    """A forward that fails half way, as when memory runs out."""
    model = tiny(family)
    middle = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1]

    with untouched(model, prompt(30)):
        handle = middle.register_forward_pre_hook(fail)
        with pytest.raises(Oops), fewer.compress(model, SNAP, keep=0.25):
            model(prompt(40))
        handle.remove()
        with fewer.compress(model, SNAP, keep=0.25) as run:
            model(prompt(40))
        assert run.report.layers[ours(run.cache)[0]].seen == (40,)


def test_a_cache_whose_forward_failed_is_not_continued_in_silence() -> None:
    """Some of its layers have read tokens that others have not."""
    model = tiny("llama")
    cache = fewer.Cache(model, SNAP, 0.25)
    cached(model, cache, prompt(40))

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(Oops):
        cached(model, cache, prompt(1))
    handle.remove()
    with pytest.raises(fewer.FewerError):
        cached(model, cache, prompt(1))


def test_inside_a_context_that_fails_at_its_door_nothing_happens() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)), pytest.raises(fewer.FewerError), fewer.compress(model, "knorm", keep=2.0):
        pass


def test_after_a_cache_was_deleted() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)):
        cache = fewer.Cache(model, ADA, 0.25)
        cached(model, cache, *turns())
        assert model.config._attn_implementation == "fewer_sdpa"
        del cache
        gc.collect()


def test_a_deleted_cache_needs_no_garbage_collector() -> None:
    model = tiny("llama")
    gc.disable()
    try:
        cache = fewer.Cache(model, ADA, 0.25)
        cached(model, cache, *turns())
        del cache
        assert model.config._attn_implementation == "sdpa"
    finally:
        gc.enable()


def test_after_a_cache_was_released() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)):
        cache = fewer.Cache(model, ADA, 0.25)
        cached(model, cache, *turns())
        cache.release()
        cache.release()
    with untouched(model, prompt(30)), fewer.Cache(model, ADA, 0.25) as cache:
        cached(model, cache, *turns())


def test_a_released_cache_says_so_and_lives_on_in_a_context() -> None:
    model = tiny("llama")
    cache, other = fewer.Cache(model, ADA, 0.25), fewer.Cache(model, ADA, 0.25)
    cached(model, cache, prompt(40)), cached(model, other, prompt(40))
    other_cache_still = cached(model, other, prompt(1))[0]
    cache.release(), other.release()
    with pytest.raises(fewer.FewerError, match="not attached"):
        cached(model, cache, prompt(1))
    with fewer.compress(model, SNAP, keep=0.5):
        assert torch.equal(cached(model, cache, prompt(1))[0], other_cache_still)


def test_a_cache_used_after_its_context_says_so() -> None:
    model = tiny("llama")
    with fewer.compress(model, ADA, keep=0.25) as run:
        out = model(prompt(40))
    with pytest.raises(fewer.FewerError, match=r"inside fewer\.compress"):
        cached(model, out.past_key_values, prompt(1))
    with pytest.raises(fewer.FewerError, match=r"inside fewer\.compress"):
        model.generate(prompt(41), past_key_values=out.past_key_values, max_new_tokens=2)
    assert run.report.layers[0].seen == (40,)  # the report can still be read


def test_the_same_model_twice_is_refused_and_the_first_goes_on() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)), fewer.compress(model, SNAP, keep=0.25) as run:
        first = model(prompt(40)).logits
        with pytest.raises(fewer.FewerError, match="leave that context first"), fewer.compress(model, ADA, keep=0.5):
            pass
        again = model(prompt(40))
        assert torch.equal(again.logits, first)
        assert run.cache is again.past_key_values
        assert run.report.method == "snapkv"
        assert run.report.layers[0].kept == ((10, 10),)
    with fewer.compress(model, ADA, keep=0.5):
        model(prompt(40))


def test_two_models_at_once_are_fine() -> None:
    one, two = tiny("llama"), tiny("qwen2")
    with untouched(one, prompt(30)), untouched(two, prompt(30)):
        with fewer.compress(one, SNAP, keep=0.25) as first, fewer.compress(two, ADA, keep=0.5) as second:
            one(prompt(40)), two(prompt(40))
        assert (first.report.method, second.report.method) == ("snapkv", "adakv")


@pytest.mark.parametrize("order", ["cache first", "context first"])
def test_a_cache_and_a_context_on_one_model(order: str) -> None:
    model = tiny("llama")
    alone = fewer.Cache(model, ADA, 0.5)
    want = cached(model, alone, *turns())
    alone.release()
    with untouched(model, prompt(30)):
        if order == "cache first":
            cache = fewer.Cache(model, ADA, 0.5)
            with fewer.compress(model, SNAP, keep=0.25) as run:
                got = cached(model, cache, *turns()[:2])
                model(prompt(40))
                assert run.report.layers[0].kept == ((10, 10),)
            got += cached(model, cache, *turns()[2:])
        else:
            with fewer.compress(model, SNAP, keep=0.25):
                model(prompt(40))
                cache = fewer.Cache(model, ADA, 0.5)
                got = cached(model, cache, *turns()[:3])
            got += cached(model, cache, *turns()[3:])
        cache.release()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_other_caches_of_an_attached_model_behave_as_always() -> None:
    from transformers import DynamicCache

    model = tiny("llama")
    want = cached(model, DynamicCache(config=model.config), *turns())
    with fewer.Cache(model, SNAP, 0.25) as cache:
        cached(model, cache, prompt(40))
        got = cached(model, DynamicCache(config=model.config), *turns())
        no_cache = model(prompt(40), use_cache=False).logits
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(no_cache, want[0])


@pytest.mark.parametrize("first", [0, 1])
def test_a_model_and_its_inner_model_share_a_config(first: int) -> None:
    """Whichever is released first, the last one out puts the config back."""
    model = tiny("llama")
    with untouched(model, prompt(30)):
        caches = [fewer.Cache(model, SNAP, 0.25), fewer.Cache(model.model, SNAP, 0.25)]
        caches.pop(first).release()
        caches[0].release()


def test_the_other_one_goes_on_when_the_first_is_released() -> None:
    model = tiny("llama")
    outer, inner = fewer.Cache(model, SNAP, 0.25), fewer.Cache(model.model, SNAP, 0.25)
    cached(model, outer, prompt(40))
    outer.release()
    assert model.model(prompt(40), past_key_values=inner).last_hidden_state.shape == (1, 40, 64)
    assert inner.report.layers[0].kept == ((10, 10),)


def test_a_copy_of_a_cache_shares_the_model() -> None:
    """A prompt's cache is often copied to be continued in several ways; its model must not be copied with it."""
    model = tiny("llama")
    with fewer.Cache(model, ADA, 0.25) as cache:
        cached(model, cache, prompt(40))
        twin = copy.deepcopy(cache)
        assert twin.shared.host.model is model
        for a, b in zip(cached(model, twin, *turns()[1:]), cached(model, cache, *turns()[1:]), strict=True):
            assert torch.equal(a, b)
        assert kept_positions(twin, 0) == kept_positions(cache, 0)


@pytest.mark.parametrize("method", METHODS)
def test_entering_alone_changes_no_tensor(method: str) -> None:
    """Methods that try out the model's rotation leave its tables as they are, while the context lasts too."""
    model = tiny("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    before = state(model)["tensors"]
    with fewer.compress(model, METHODS[method], keep=0.5):
        model(prompt(40))
        after = state(model)["tensors"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
