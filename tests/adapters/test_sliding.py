"""Sliding-window layers bound themselves: they are left alone, reported as such, and what is around them is right."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fewer
from fewer.types import UnsupportedModel
from tests.adapters.common import ADA, METHODS, SNAP, cached, turns, untouched
from tests.adapters.emulate import Twin, difference, ours
from tests.tiny import prompt, tiny

MIXED = {
    "gemma3_text": {},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("family", MIXED)
def test_left_alone_and_reported_so(family: str) -> None:
    model = tiny(family, **MIXED[family])
    with fewer.compress(model, SNAP, keep=0.25) as run:
        model.generate(prompt(60), max_new_tokens=4, do_sample=False)
        report = run.report
    types = model.config.layer_types
    assert [layer.state for layer in report.layers] == [
        "left alone" if kind == "sliding_attention" else "compressed" for kind in types
    ]
    sliding = sum(kind == "sliding_attention" for kind in types)
    assert report.notes == (f"{sliding} sliding-window layers are left alone",)
    assert "left alone" in str(report) and report.notes[0] in str(report)
    assert report.kept == pytest.approx((15 + 3) / 63)


@pytest.mark.parametrize("family", MIXED)
def test_they_hold_what_the_host_would(family: str) -> None:
    """The first layer's keys depend on nothing that was compressed; all of them hold a window and no more."""
    model = tiny(family, **MIXED[family])
    host, mine = DynamicCache(config=model.config), fewer.Cache(model, SNAP, 0.25)
    cached(model, host, *turns()), cached(model, mine, *turns())
    for index, (theirs, layer) in enumerate(zip(host.layers, mine.layers, strict=True)):
        if index not in ours(mine):
            assert type(layer) is type(theirs)
            assert layer.keys.shape == theirs.keys.shape == (1, 2, 15, 16)
            assert layer.get_seq_length() == theirs.get_seq_length() == 47
            if index == 0:
                assert torch.equal(layer.keys, theirs.keys)
                assert torch.equal(layer.values, theirs.values)


def test_their_windows_do_not_hold_the_prompt() -> None:
    model = tiny("gemma3_text")
    cache = fewer.Cache(model, SNAP, 0.25)
    cached(model, cache, prompt(200))
    for index, layer in enumerate(cache.layers):
        if index not in ours(cache):
            held = layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
            assert cache.report.layers[index].bytes_kept == held


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("length", [9, 15, 16, 17, 60])
def test_prompts_around_the_window(family: str, length: int) -> None:
    """Shorter than the window, as long, and longer; and growing past it afterwards."""
    twin = Twin(family, METHODS["knorm"], 0.5, **MIXED[family])
    for seed, n in enumerate((length, 3, *[1] * 6, 12)):
        assert difference(*twin.step(prompt(n, seed=seed))) <= 1e-4


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 4}),
        ("phi3", {"sliding_window": 16}),
    ],
)
@pytest.mark.parametrize("method", [ADA, "fastkv"], ids=["adakv", "fastkv"])  # fastkv chooses a layer: here of none
def test_a_model_of_windows_only_is_refused(family: str, changes: dict[str, object], method: Any) -> None:
    model = tiny(family, **changes)
    with untouched(model, prompt(30)):
        refused = pytest.raises(UnsupportedModel, match="sliding-window layers only")
        with refused, fewer.compress(model, method, keep=0.5):
            pass
        with refused:
            fewer.Cache(model, method, keep=0.5)
