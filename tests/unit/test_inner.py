"""Methods inside methods: what they say is passed on, what they do is done, and what would be lost is refused."""

from typing import Any

import pytest
import torch

import fewer
from fewer.adapters.hf_policy import Policy
from fewer.adapters.vlm_cache import OnlyVisual
from fewer.inner import inside, published
from fewer.methods.any.uniform import Uniform
from fewer.methods.kv.a2sf import A2SF
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.criticalkv import CriticalKV
from fewer.methods.kv.ems import EMS
from fewer.methods.kv.fastkv import FastKV
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.kvzip import KVzip
from fewer.methods.kv.merge_evict import MergeEvict
from fewer.methods.kv.mikv import MiKV
from fewer.methods.kv.minicache import MiniCache
from fewer.methods.kv.scissorhands import Scissorhands
from fewer.methods.kv.sinklora import SinkLoRA
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.tidaldecode import TidalDecode
from fewer.methods.kv.treekv import TreeKV
from fewer.methods.kv.zipvl import ZipVL
from fewer.types import Budget, FewerError
from tests.methods.kv.build import decide, kept, place, random_row
from tests.tiny import prompt, tiny

MORE = (KIVI(), MiKV(), MiniCache(), TidalDecode(), FastKV(), ZipVL(), ZipVL(variant="drop"))
"""They pack, pair, skip, pass on or leave unread."""


def test_inside_is_innermost_first() -> None:
    snap = SnapKV()
    ada = AdaKV(snap)
    assert list(inside(CriticalKV(ada))) == [snap, ada, CriticalKV(ada)]


@pytest.mark.parametrize("inner", MORE, ids=str)
@pytest.mark.parametrize("outer", [AdaKV, CriticalKV, MergeEvict])
def test_what_a_wrapper_would_lose_is_refused(outer: Any, inner: Any) -> None:
    match = f"^{type(inner).__name__} does more to a cache than evict from it, and {outer.__name__} around .* SnapKV"
    with pytest.raises(FewerError, match=match):
        outer(inner)
    with pytest.raises(FewerError, match="cannot be kept to visual entries"):
        OnlyVisual(inner)


@pytest.mark.parametrize("inner", [StreamingLLM(), H2O(), A2SF(), SinkLoRA(), Uniform(), EMS(), TreeKV(), MergeEvict()])
def test_two_stages_are_for_methods_that_keep_their_highest_scores(inner: Any) -> None:
    with pytest.raises(
        FewerError, match=f"^{type(inner).__name__} does not just keep .* CriticalKV around it .* SnapKV"
    ):
        CriticalKV(inner)
    with pytest.raises(FewerError, match="does not just keep"):
        CriticalKV(AdaKV(inner))


def test_methods_that_keep_their_highest_scores_may_stand_inside() -> None:
    for inner in (SnapKV(), KNorm(), AdaKV(), H2O(recent=0.0), StreamingLLM(positions="original"), KVzip()):
        assert CriticalKV(inner).scorer == inner


@pytest.mark.parametrize("outer", [AdaKV, CriticalKV, MergeEvict])
def test_a_wrapper_acts_when_the_method_inside_does(outer: Any) -> None:
    for inner, when, every in ((Scissorhands(), "both", 64), (SnapKV(), "prefill", 64)):
        policy = Policy.of(outer(inner), Budget.parse(0.5))
        assert (policy.when, policy.every) == (when, every)
    assert published(AdaKV(TreeKV())) == ("both", 1)


@pytest.mark.parametrize("inner", [H2O(), A2SF(recent=4), Uniform()])
def test_a_head_that_is_given_its_even_share_holds_what_the_method_inside_would(inner: Any) -> None:
    """With all of the budget as floor nothing is shared: recent tokens, and distances, are the inner method's."""
    row = random_row(63)
    tokens, alone = place(AdaKV(inner, floor=1.0), row), place(inner, row)
    assert kept(tokens, decide(AdaKV(inner, floor=1.0), 0.25, tokens)) == kept(alone, decide(inner, 0.25, alone))


def test_keys_are_moved_where_the_method_inside_moves_them() -> None:
    model = tiny("llama")
    with torch.no_grad(), fewer.Cache(model, AdaKV(StreamingLLM()), 0.25) as cache:
        model(prompt(64), past_key_values=cache)
        assert all(layer.kept.placed is not None for layer in cache.shared.members)


def test_a_budget_is_shared_among_heads_once() -> None:
    model = tiny("llama")
    for inner in (AdaKV(SnapKV(window=8)), KVzip()):
        with fewer.compress(model, AdaKV(inner), 0.25), pytest.raises(FewerError, match="shared among them already"):
            model(prompt(64))
