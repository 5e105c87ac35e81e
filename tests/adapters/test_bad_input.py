"""Bad input: one clear error of ours, which names the value and the remedy, and a model that nobody touched."""

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fewer
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.lagkv import LagKV
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.types import BudgetError, FewerError, FewerWarning, UnknownName, UnsupportedModel
from tests.adapters.common import SNAP, cached, refused, untouched
from tests.adapters.emulate import assert_close
from tests.tiny import prompt, tiny


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, -0.5, math.nan, math.inf, "half", "", "0MB", "50%", True])
def test_keep_that_cannot_be(keep: Any) -> None:
    refused(tiny("llama"), BudgetError, f"keep={keep!r}", keep=keep)
    with pytest.raises(BudgetError, match=r"a fraction in \(0, 1\], a token count such as 256, or bytes"):
        fewer.Cache(tiny("llama"), "knorm", keep)


@pytest.mark.parametrize(
    ("name", "near"),
    [("snapvk", "snapkv"), ("SnapKV", "snapkv"), ("ada-kv", "adakv"), ("streamingllm", "streaming-llm")],
)
def test_unknown_method_names_the_nearest(name: str, near: str) -> None:
    refused(tiny("llama"), UnknownName, f"there is no method '{name}'; did you mean .*{near}", name)


def test_unknown_method_names_all_known_ones() -> None:
    with pytest.raises(UnknownName) as raised:
        fewer.Cache(tiny("llama"), "zzz", 0.5)
    assert all(name in str(raised.value) for name in fewer.METHODS)


def test_a_class_is_no_method() -> None:
    refused(
        tiny("llama"), UnknownName, "neither a name nor an object with needs, score, allocate and reduce", type(SNAP)
    )


@pytest.mark.parametrize("when", ["sometimes", "", "Prefill"])
def test_when_that_is_none_of_three(when: Any) -> None:
    refused(tiny("llama"), FewerError, "'prefill', 'decode' or 'both'", when=when)


@pytest.mark.parametrize("every", [0, -1, True])
def test_every_that_is_no_count(every: Any) -> None:
    refused(tiny("llama"), FewerError, f"every={every!r}", when="both", every=every)


EMPTY = torch.zeros(1, 0, dtype=torch.long)


def test_an_empty_prompt() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)), fewer.compress(model, "knorm", keep=0.5):
        with pytest.raises(FewerError, match="empty prompt"):
            model(EMPTY)
        with pytest.raises(FewerError, match="empty prompt"):
            model(inputs_embeds=torch.zeros(1, 0, 64))
        model(prompt(30))


def test_an_empty_prompt_for_generate() -> None:
    model = tiny("llama")
    # transformers 5.2 trips over it before it calls the model
    theirs = (FewerError,) if hasattr(DynamicCache, "activate_past_recording") else (FewerError, IndexError)
    with untouched(model, prompt(30)), pytest.raises(theirs), fewer.compress(model, "knorm", keep=0.5):
        model.generate(EMPTY, max_new_tokens=2)


def test_an_empty_prompt_for_a_cache_by_hand() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)), fewer.Cache(model, "knorm", keep=0.5) as cache:
        with pytest.raises(FewerError, match="empty prompt"):
            cached(model, cache, EMPTY)
        cached(model, cache, prompt(30))
        assert cache.report.layers[0].kept == ((15, 15),)


def test_a_prompt_shorter_than_the_window_is_kept_whole_and_said_so() -> None:
    model = tiny("llama")
    want = cached(model, DynamicCache(config=model.config), prompt(40), prompt(1))
    with fewer.compress(model, "snapkv", keep=0.25) as run:
        with pytest.warns(FewerWarning, match=r"rows of \[40\] tokens are no longer than the window of 64") as caught:
            out = model(prompt(40))
        assert len(caught) == 1  # once, not for every layer
        after = model(prompt(1), past_key_values=out.past_key_values)
        report = run.report
    assert torch.equal(out.logits, want[0])
    assert torch.equal(after.logits, want[1])
    assert [layer.state for layer in report.layers] == ["whole"] * 3
    assert any("kept whole" in note for note in report.notes)
    assert "note: rows of [40]" in str(report)


def test_a_short_row_of_a_batch_is_kept_whole_and_the_others_are_not() -> None:
    model = tiny("llama")
    real = torch.ones(2, 40, dtype=torch.long)
    real[1, :33] = 0
    with fewer.Cache(model, SNAP, keep=0.25) as cache:
        with pytest.warns(FewerWarning, match=r"rows of \[7\] tokens"):
            model(prompt(40, rows=2), attention_mask=real, past_key_values=cache)
        assert cache.report.layers[0].kept == ((10, 10), (7, 7))


def test_no_cache_to_compress() -> None:
    model = tiny("llama")
    with untouched(model, prompt(30)), fewer.compress(model, "knorm", keep=0.5):
        with pytest.raises(FewerError, match="use_cache is off"):
            model(prompt(30), use_cache=False)
        with pytest.raises(FewerError, match="use_cache is off"):
            model.generate(prompt(30), max_new_tokens=2, use_cache=False)


def test_a_cache_that_is_not_ours() -> None:
    model = tiny("llama")
    filled = DynamicCache(config=model.config)
    cached(model, filled, prompt(20))
    with untouched(model, prompt(30)), fewer.compress(model, "knorm", keep=0.5) as run:
        with pytest.raises(UnsupportedModel, match=r"a DynamicCache that fewer did not make.*fewer\.Cache"):
            cached(model, filled, prompt(1))
        with pytest.raises(FewerError, match="nothing was compressed yet"):
            run.report.to_dict()
        cached(model, DynamicCache(config=model.config), prompt(30))  # an empty one is replaced
        assert run.report.layers[0].kept == ((15, 15),)


@pytest.mark.parametrize(("asked", "said"), [("static", "a StaticCache that"), ("offloaded", "with offloading that")])
def test_another_kind_of_cache(asked: str, said: str) -> None:
    model = tiny("llama")
    with fewer.compress(model, "knorm", keep=0.5), pytest.raises(UnsupportedModel, match=f"{said} fewer did not make"):
        model.generate(prompt(30), max_new_tokens=2, cache_implementation=asked)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_of_another_model() -> None:
    """The other model would fill it without compressing a thing."""
    one, two = tiny("llama"), tiny("llama")
    with fewer.Cache(one, "knorm", 0.5) as cache, pytest.raises(FewerError):
        cached(two, cache, prompt(30), prompt(1))


def test_bytes_below_a_single_token() -> None:
    model = tiny("llama")
    one = 3 * 2 * (2 * 16 * 4 + 4)
    too_little = pytest.raises(BudgetError, match=f"keep='100B' is below the {one:,} bytes")
    with untouched(model, prompt(30)), too_little, fewer.compress(model, "knorm", keep="100B"):
        model(prompt(30))
    with fewer.Cache(model, "knorm", keep=f"{one}B") as cache:
        cached(model, cache, prompt(30))
        assert cache.report.layers[0].kept == ((1, 1),)
        assert cache.report.bytes_kept == one


FLOORS: dict[str, tuple[Any, int]] = {
    "snapkv": (SnapKV(window=8), 8),
    "streaming-llm": (StreamingLLM(sinks=6, positions="original"), 6),
    "lagkv": (LagKV(lag=8, sinks=5), 5),
    "adakv": (AdaKV(SnapKV(window=7)), 7),
}


@pytest.mark.parametrize("name", FLOORS)
def test_bytes_below_what_a_method_always_keeps(name: str) -> None:
    """Its sinks and its window: enough bytes for them are taken, one fewer are refused, and the error says how many."""
    (method, always), model = FLOORS[name], tiny("llama")
    floor = always * 3 * 2 * (2 * 16 * 4 + 4)
    with fewer.Cache(model, method, keep=f"{floor}B") as cache:
        cached(model, cache, prompt(40))
        assert cache.report.bytes_kept <= floor
    short = (
        rf"keep='{floor - 1}B' holds {always - 1} tokens a head, and {type(method).__name__} always keeps {always} "
        rf"\(sinks, window\), which take {floor:,} bytes"
    )
    with (
        untouched(model, prompt(40)),
        pytest.raises(BudgetError, match=short),
        fewer.compress(model, method, keep=f"{floor - 1}B"),
    ):
        model(prompt(40))


def test_training_with_dropout_says_so() -> None:
    model = tiny("llama", attention_dropout=0.1)
    with fewer.Cache(model, SNAP, 0.5) as cache:
        cached(model, cache, prompt(40))
        model.train()
        with pytest.raises(FewerError, match=r"model\.eval\(\)"):
            cached(model, cache, prompt(3))


def test_one_refusal_does_not_spoil_the_next_use() -> None:
    model = tiny("llama")
    with fewer.Cache(model, SNAP, 0.5) as cache:
        want = cached(model, cache, prompt(40), prompt(1))
    for method, keep in (("zzz", 0.5), (SNAP, -1), (SNAP, "1B")):
        with pytest.raises(FewerError), fewer.compress(model, method, keep):
            model(prompt(40))
    with fewer.Cache(model, SNAP, 0.5) as cache:
        for got, was in zip(cached(model, cache, prompt(40), prompt(1)), want, strict=True):
            assert_close(got, was, within=0)


def test_a_part_of_a_model_that_is_in_use_is_refused() -> None:
    """Its layers are the whole's: the inner method would do nothing, and its report be the outer one's."""
    model = tiny("llama")
    with (
        untouched(model, prompt(30)),
        fewer.compress(model, "snapkv", 0.5),
        pytest.raises(FewerError, match="this LlamaModel is inside fewer"),
        fewer.compress(model.model, "knorm", 0.25),
    ):
        pass
