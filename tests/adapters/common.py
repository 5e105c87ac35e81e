"""What the adapter tests share: methods with windows fit for short prompts, snapshots of a model, bytes really held."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewer
from fewer.fit import Fit, fingerprint
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.expected_attention import ExpectedAttention
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.pyramidkv import PyramidKV
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.tova import TOVA
from fewer.types import FewerError
from tests.laws.scene import DIM, HEADS, KV_HEADS, fitted
from tests.tiny import CONFIGS, prompt, tiny

FAMILIES = list(CONFIGS)
SNAP = SnapKV(window=8)
ADA = AdaKV(SNAP)
METHODS: dict[str, Any] = {
    "snapkv": SNAP,
    "adakv": ADA,
    "h2o": H2O(),
    "knorm": KNorm(),
    "expected-attention": ExpectedAttention(future=16),
    "streaming-llm": StreamingLLM(positions="original"),
}
MORE_METHODS: dict[str, Any] = {
    **METHODS,
    "streaming-llm in cache": StreamingLLM(),
    "pyramidkv": PyramidKV(window=8),
    "tova": TOVA(),
}

PAIRS = [(family, "adakv") for family in FAMILIES] + [("llama", name) for name in MORE_METHODS if name != "adakv"]
"""Every family with one method, and every method on one family: one fault shows in either."""

SMALL = {"kivi": KIVI(group=8, residual=16), "gear": GEAR(group=8, block=16, rank=2)}
"""Forms of storage with groups that fit small models."""


def decoder(name: str, **changes: Any) -> tuple[Any, Any, float]:
    """A small decoder, the method of that name, fitted where it has to be, and a budget for it."""
    sizes = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model, method = tiny("llama", num_hidden_layers=4, **sizes, **changes), SMALL.get(name) or fitted(name)
    fit = getattr(method, "fit", None)
    if isinstance(fit, Fit):  # made by hand, for no model, or for one of another precision
        method = replace(method, fit=replace(fit, model=fingerprint(model)))
    return model, method, 1.0 if getattr(method, "whole", False) else 0.5


def cached(model: Any, cache: Any, *turns: Tensor, **call: Any) -> list[Tensor]:
    """Logits of each turn, one after the other on one cache."""
    return [model(ids, past_key_values=cache, **call).logits for ids in turns]


def turns(n: int = 40) -> tuple[Tensor, ...]:
    """A prompt, and what follows: several tokens at once, then single ones."""
    return prompt(n), prompt(5, seed=1), prompt(1, seed=2), prompt(1, seed=3)


# --- a model as it is ---


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that leaving must give back, logits included where there are any."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_pre_hooks_with_kwargs")
    found: dict[str, Any] = {
        "attention": [getattr(config, "_attn_implementation", None) for config in configs.values()],
        "configs": [deepcopy(config.to_dict()) for config in configs.values()],
        "config attributes": [deepcopy(vars(config)) for config in configs.values()],
        "hooks": [(name, len(getattr(m, hook))) for name, m in model.named_modules() for hook in hooks],
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
        "classes": [type(m) for m in model.modules()],
        "forwards": ["forward" in vars(m) for m in model.modules()],
        "tensors": {
            f"{name}.{key}": tensor if tensor.is_meta else tensor.clone()
            for name, m in model.named_modules()
            for part in (m._parameters, m._buffers)
            for key, tensor in part.items()
            if tensor is not None
        },
    }
    return found


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert tensor.is_meta or torch.equal(tensor, after["tensors"][name]), name


@contextmanager
def untouched(model: nn.Module, ids: Tensor | None = None) -> Iterator[None]:
    """Check that whatever happens inside leaves the model, and its logits for `ids`, bit for bit as they were."""
    before, logits = state(model), None if ids is None else model(ids).logits
    yield
    assert_same_state(before, state(model))
    if logits is not None:
        assert torch.equal(model(ids).logits, logits)


# --- bytes really held ---


def tensors_in(thing: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Every tensor reachable from a cache, without going into its model."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, nn.Module):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    elif type(thing).__module__.startswith(("fewer", "transformers")):
        skipped = ("host", "_attachment", "_release", "_sliding_window_tensor", "rotary")  # the model's own, not data
        parts = [part for name, part in vars(thing).items() if name not in skipped]
    else:
        return []
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


def held(cache: Any) -> int:
    """Bytes of all storages that a cache keeps alive."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(cache)}.values())


@contextmanager
def newborn(model: nn.Module) -> Iterator[Callable[[], dict[int, int]]]:
    """Gives a function that tells the storages of tensors made since, if they still live: address and bytes."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def look() -> dict[int, int]:
        gc.collect()
        storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), Tensor)]
        return {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}

    gc.freeze()  # what is there already is not looked at again, which makes looking cheap
    try:
        yield look
    finally:
        gc.unfreeze()


# --- what both front doors refuse ---


def refused(
    model: Any, error: type[FewerError], message: str, method: Any = "knorm", keep: Any = 0.5, **how: Any
) -> None:
    """Both front doors refuse, and leave everything as it was."""
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message), fewer.compress(model, method, keep, **how):
        raise AssertionError("the context was entered")
    with pytest.raises(error, match=message):
        fewer.Cache(model, method, keep, **how)
    if before is not None:
        assert_same_state(before, state(model))
