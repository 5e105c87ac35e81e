"""Budgets that hold no more than what a method always keeps: the first tokens go last, and the report says so."""

from typing import Any

import pytest
import torch

import fewer
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.expected_attention import ExpectedAttention
from fewer.methods.kv.kvzap import KVzap
from fewer.methods.kv.kvzip import KVzip
from fewer.methods.kv.lagkv import LagKV
from fewer.methods.kv.sinklora import SinkLoRA
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.treekv import TreeKV
from tests.adapters.common import cached
from tests.tiny import prompt, tiny

SINKS: dict[str, Any] = {
    "streaming-llm": StreamingLLM(),
    "sinklora": SinkLoRA(),
    "lagkv": LagKV(),
    "kvzip": KVzip(),
    "expected-attention": ExpectedAttention(),
    "adakv": AdaKV(ExpectedAttention(), floor=0.5),
    "treekv": TreeKV(),
}


def said(keep: object, name: str) -> str:
    return (
        f"keep={keep!r} gives some heads no more than what {name} always keeps (sinks, window): nothing is left to its "
        f"scores there"
    )


def held(model: Any, method: Any, keep: Any, *lengths: int) -> tuple[list[list[int]], tuple[str, ...]]:
    """The positions that every head of every layer holds in the end, and the report's notes."""
    with fewer.Cache(model, method, keep) as cache:
        cached(model, cache, *(prompt(n) for n in lengths))
        found = [head for layer in cache.shared.members for head in layer._dense().positions[0].tolist()]
        return [[at for at in head if at >= 0] for head in found], cache.report.notes


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("keep", [2, 3, 4, 0.1])
def test_the_first_sinks_go_last(name: str, keep: float | int) -> None:
    heads, notes = held(tiny("llama"), SINKS[name], keep, 20)
    assert heads == [list(range(2 if keep == 0.1 else int(keep)))] * 6
    # which sinks a tree has is settled with its plan
    assert notes == (() if name == "treekv" else (said(keep, type(SINKS[name]).__name__),))


def test_what_the_sinks_leave_is_the_windows_end() -> None:
    model = tiny("llama", num_hidden_layers=2)
    method = KVzap(KVzap.fit_to(model, [prompt(64), prompt(64, seed=1)], seed=0))
    heads, notes = held(model, method, 0.1, 200)
    assert heads == [[0, 1, 2, 3, *range(184, 200)]] * 4 and notes == (said(0.1, "KVzap"),)


@pytest.mark.parametrize(
    ("method", "keep", "filled"),
    [
        (SnapKV(window=8), 7, True),
        (SnapKV(window=8), 8, True),
        (SnapKV(window=8), 9, False),
        (SnapKV(window=8), 0.2, True),
        (SnapKV(window=8), 0.21, False),
        (AdaKV(SnapKV(window=8), floor=0.0), 9, False),  # a head may be left with its window, by its scores
        (StreamingLLM(), 5, False),
        (StreamingLLM(sinks=40), 40, False),  # all of it
        ("h2o", 2, False),
        ("snapkv", 1.0, False),
    ],
)
def test_the_report_says_where_nothing_is_left_to_scores(method: Any, keep: float | int, filled: bool) -> None:
    """Of 40 tokens. Nobody is warned: as many were asked for as are kept."""
    notes = held(tiny("llama"), method, keep, 40)[1]
    assert notes == ((said(keep, type(method).__name__),) if filled else ())


def test_it_is_said_once() -> None:
    """Two prompts, two decisions for each layer, one line."""
    assert held(tiny("llama"), StreamingLLM(), 0.05, 40, 40)[1] == (said(0.05, "StreamingLLM"),)


def test_of_budgets_by_head_the_smallest_counts() -> None:
    """A list of budgets goes by the name of its mean, 17."""
    model = tiny("llama")
    with fewer.compress(model, StreamingLLM(), keep=[[20, 20], [20, 4], [20, 20]]) as run:
        model(prompt(40))
        assert run.report.notes == (said(17, "StreamingLLM"),)
    with fewer.compress(model, StreamingLLM(), keep=[[20, 20], [20, 5], [20, 20]]) as run:
        model(prompt(40))
        assert run.report.notes == ()


def test_a_short_row_of_a_batch_is_enough() -> None:
    model = tiny("llama")
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :40] = 0
    with fewer.Cache(model, StreamingLLM(), 0.2) as cache:
        model(prompt(60, rows=2), attention_mask=mask, past_key_values=cache)
        assert cache.report.layers[0].kept == ((12, 12), (4, 4))
        assert cache.report.notes == (said(0.2, "StreamingLLM"),)
