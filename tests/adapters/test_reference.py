"""Real removal equals masked emulation: the cache that let entries go answers like one that keeps and hides them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.streaming_llm import StreamingLLM
from tests.adapters.common import ADA, FAMILIES, METHODS, SNAP
from tests.adapters.emulate import Twin, View, assert_close, difference, kept_positions, ours, turned
from tests.tiny import prompt, tiny

FOLLOWING = [7, 1, 4, 1]  # tokens of the forwards after the prompt: several at once, and single ones


def follow(twin: Twin) -> float:
    """The largest difference over a prompt and what follows it."""
    lengths = [44, *FOLLOWING]
    return max(difference(*twin.step(prompt(n, seed=i))) for i, n in enumerate(lengths))


@pytest.mark.parametrize("keep", [0.5, 0.25])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_equals_masking(family: str, method: str, keep: float) -> None:
    twin = Twin(family, METHODS[method], keep)
    assert follow(twin) <= 1e-4
    assert twin.cache.report.kept < keep + 0.1


@pytest.mark.parametrize("keep", [0.5, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_in_cache_equal_masking_with_turned_sinks(family: str, keep: float) -> None:
    assert follow(Twin(family, StreamingLLM(), keep, sinks=4)) <= 1e-4


def test_positions_in_cache_without_gaps_need_no_gap_to_the_query() -> None:
    """Kept keys at 0, 1, 2, ... and the query right after them: what section 3.2 of the paper says, word for word."""
    twin = Twin("llama", StreamingLLM(), 0.25, sinks=4)
    twin.step(prompt(40))
    views = {}
    for index in ours(twin.cache):
        keep = torch.zeros(1, 2, 40, dtype=torch.bool)
        inside, shift = torch.arange(10), torch.zeros(1, 2, 40, dtype=torch.long)
        for head, positions in enumerate(kept_positions(twin.cache, index)[0]):
            assert positions == [0, 1, 2, 3, *range(34, 40)]
            keep[0, head, positions] = True
            # the query stays at 40; seen from there, distances are those to a query at 10
            shift[0, head, positions] = inside - torch.tensor(positions) + 30
        views[index] = View(keep, shift)
    assert_close(*twin.step(prompt(1, seed=1), views=views))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_emulation_turns_keys_as_the_model_does(family: str) -> None:
    """The emulation's own rotation and the model's: a key at position p turned on by 3 is that key at p + 3."""
    twin = Twin(family, "full", 1.0)
    attention = next(m for m in twin.plain.modules() if getattr(m, "layer_idx", None) == ours(twin.cache)[0])
    keys = {}
    for start in (0, 3):
        at = torch.arange(start, start + 6).unsqueeze(0)
        out = tiny(family)(prompt(6), position_ids=at, use_cache=True)
        keys[start] = out.past_key_values.layers[ours(twin.cache)[0]].keys
    by = torch.full(keys[0].shape[:3], 3)
    assert_close(turned(attention, keys[0], by), keys[3])
    assert difference(turned(attention, keys[0], by + 1), keys[3]) > 1e-2


@pytest.mark.parametrize("method", [SNAP, ADA, H2O()], ids=["snapkv", "adakv", "h2o"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_one_more_key_is_noticed(family: str, method: Any) -> None:
    """The comparison's own test: an emulation that drops one entry more in one layer must fail it."""
    twin = Twin(family, method, 0.5)
    twin.step(prompt(44))
    views = twin.views()
    layer = ours(twin.cache)[-1]
    wrong = views[layer].keep.clone()
    wrong[0, 0, int(wrong[0, 0].nonzero()[-1])] = False
    views[layer] = replace(views[layer], keep=wrong)
    assert difference(*twin.step(prompt(3, seed=1), views=views)) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_matters_at_all(family: str) -> None:
    """A model that did not care what it has dropped could not tell a right cache from a wrong one."""
    twin = Twin(family, SNAP, 0.25)
    twin.step(prompt(44))
    everything = {i: View(torch.ones_like(view.keep)) for i, view in twin.views().items()}
    assert difference(*twin.step(prompt(3, seed=1), views=everything)) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_heads_of_adakv_really_differ(family: str) -> None:
    twin = Twin(family, ADA, 0.25)
    twin.step(prompt(44))
    for index in ours(twin.cache):
        lengths = [len(positions) for positions in kept_positions(twin.cache, index)[0]]
        assert len(set(lengths)) > 1
        assert sum(lengths) == len(lengths) * 11


@pytest.mark.parametrize("method", [SNAP, ADA], ids=["snapkv", "adakv"])
def test_long_follow_up_in_blocks(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are taken in blocks where their logits would be large; the answer must not notice."""
    twin = Twin("llama", method, 0.5)
    twin.step(prompt(40))
    monkeypatch.setattr("fewer.attention.BLOCK_CELLS", 4 * 50 * 7)  # 7 queries of the 30 at a time
    assert_close(*twin.step(prompt(30, seed=1)))
    real = torch.ones(1, 12, dtype=torch.long)
    real[0, :5] = 0
    assert_close(*twin.step(prompt(12, seed=2), real=real))
