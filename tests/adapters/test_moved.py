"""Keys that are moved token after token are rounded once, whatever their dtype and however often they are moved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fewer
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.treekv import TreeKV
from tests.adapters.common import SMALL
from tests.tiny import prompt, tiny

MOVING = [StreamingLLM(), TreeKV(block=8)]
HALVES = [torch.bfloat16, torch.float16]


def steps(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last step's logits."""
    return torch.stack([model(one, past_key_values=cache).logits[:, -1] for one in ids.split(1, dim=1)])[-1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", MOVING, ids=lambda method: type(method).__name__)
def test_keys_that_moved_a_hundred_times_are_rounded_once(method: Any, dtype: torch.dtype) -> None:
    model, ids, more = tiny("llama", dtype=dtype, num_hidden_layers=1), prompt(20), prompt(100, seed=5)
    plain = DynamicCache(config=model.config)
    model(torch.cat([ids, more], 1), past_key_values=plain)  # one layer: its keys depend on their own tokens alone
    with fewer.Cache(model, method, 16, when="both", every=1) as cache:
        model(ids, past_key_values=cache)
        steps(model, cache, more)
    held, rotary = cache.layers[0]._dense(), cache.shared.host.rotary
    moved = held.placed - held.positions
    assert int(moved.max()) == 104, "the sinks stand before all that is kept"
    wide = held.positions.unsqueeze(-1).expand_as(held.keys)
    torch.testing.assert_close(held.keys, rotary.turn(plain.layers[0].keys.gather(2, wide), moved), atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("store", [None, SMALL["kivi"]], ids=["as it is", "kivi"])
@pytest.mark.parametrize("method", MOVING, ids=lambda method: type(method).__name__)
def test_such_a_cache_can_do_all_that_others_can(method: Any, store: Any, tmp_path: Path) -> None:
    model, ids, more = tiny("llama", dtype=torch.bfloat16), prompt(40), prompt(6, seed=3)
    when: Any = "both" if store is None else "prefill"  # what is packed cannot be moved again
    cache = fewer.Cache(model, method, 0.5, when=when, store=store)
    model(torch.cat([ids, ids.flip(1)]), past_key_values=cache)
    steps(model, cache, more.expand(2, -1))
    cache.save(tmp_path / "cache.safetensors")
    loaded = fewer.Cache.load(model, tmp_path / "cache.safetensors")
    alone, one = copy.deepcopy(cache), copy.deepcopy(cache)
    want = steps(model, alone, more.expand(2, -1))
    torch.testing.assert_close(steps(model, loaded, more.expand(2, -1)), want, atol=0, rtol=0)
    one.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(steps(model, one, more)[0], want[1], atol=0.05, rtol=0)  # batches round otherwise
    for mine, both in zip(cache.layers, fewer.Cache.stack([cache.fork(), cache.fork()]).layers, strict=True):
        assert store is not None or mine.kept.source
        torch.testing.assert_close(both._dense().keys, mine._dense().keys.repeat(2, 1, 1, 1), atol=0, rtol=0)
