"""One prefill for many methods: `under` equals compressing in line, `stack` keeps rows apart, `freeze` stops."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import fewer
from fewer.methods.any.full import Full
from fewer.types import Allocation, Budget, MissingSignal, Plan, Tokens
from tests.adapters.common import ADA, FAMILIES, METHODS, MORE_METHODS, PAIRS, SNAP, cached, held, turns
from tests.adapters.emulate import assert_close, kept_positions, ours
from tests.tiny import prompt, tiny


@dataclass(frozen=True)
class Watch:
    """Keeps everything, and gathers what all the methods need."""

    @property
    def needs(self) -> frozenset[Any]:
        return frozenset().union(*(method.needs for method in MORE_METHODS.values()))

    def score(self, tokens: Tokens) -> torch.Tensor:
        return Full().score(tokens)

    def allocate(self, tokens: Tokens, scores: torch.Tensor, budget: Budget) -> Allocation:
        return Full().allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: torch.Tensor, allocation: Allocation) -> Plan:
        return Full().reduce(tokens, scores, allocation)


def watched(model: Any, **call: Any) -> fewer.Cache:
    cache = fewer.Cache(model, Watch(), keep=1.0)
    model(call.pop("ids", prompt(40)), past_key_values=cache, **call)
    return cache


def everything_kept(cache: Any) -> list[Any]:
    return [kept_positions(cache, index) for index in ours(cache)]


@pytest.mark.parametrize("keep", [0.25, 17, "16KB"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_under_is_compressing_in_line(family: str, method: str, keep: Any) -> None:
    model = tiny(family)
    base = watched(model)
    before = base.report
    under = base.under(MORE_METHODS[method], keep)
    inline = fewer.Cache(model, MORE_METHODS[method], keep)
    cached(model, inline, prompt(40))
    inline.freeze()
    assert everything_kept(under) == everything_kept(inline)
    for got, want in zip(cached(model, under, *turns()[1:]), cached(model, inline, *turns()[1:]), strict=True):
        assert torch.equal(got, want)
    mine, theirs = under.report, inline.report
    assert (mine.method, mine.keep) == (theirs.method, theirs.keep)
    assert [layer.kept for layer in mine.layers] == [layer.kept for layer in theirs.layers]
    assert [layer.asked for layer in mine.layers] == [layer.asked for layer in theirs.layers]
    assert base.report == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_left_as_it_was(family: str) -> None:
    model = tiny(family)
    base = watched(model)
    for method in MORE_METHODS.values():
        cached(model, base.under(method, 0.25), *turns()[1:])
    host = DynamicCache(config=model.config)
    want = cached(model, host, *turns())[1:]
    for got, theirs in zip(cached(model, base, *turns()[1:]), want, strict=True):
        assert torch.equal(got, theirs)


def test_under_counts_its_own_bytes_and_seconds() -> None:
    model = tiny("llama")
    base = watched(model)
    for method in METHODS.values():
        under = base.under(method, 0.25)
        assert held(under) == under.report.bytes_kept
        assert under.report.seconds > 0


def test_under_of_a_padded_batch() -> None:
    model = tiny("llama")
    real = torch.ones(3, 40, dtype=torch.long)
    real[0, :9], real[1, 33:] = 0, 0
    at = (real.cumsum(-1) - 1).clamp(min=0)
    call = {"attention_mask": real, "position_ids": at}
    base = watched(model, ids=prompt(40, rows=3), **call)
    for method in MORE_METHODS.values():
        inline = fewer.Cache(model, method, 0.5)
        model(prompt(40, rows=3), past_key_values=inline, **call)
        assert everything_kept(base.under(method, 0.5)) == everything_kept(inline)


def test_under_without_the_signal_says_which() -> None:
    model = tiny("llama")
    base = fewer.Cache(model, "knorm", 1.0)
    cached(model, base, prompt(40))
    base.under("knorm", 0.5)
    with pytest.raises(MissingSignal, match="Queries"):
        base.under(SNAP, 0.5)


def test_under_keeps_nothing_of_the_base_alive() -> None:
    """Bytes of one method's cache are its own: not a view into the base."""
    model = tiny("llama")
    base = watched(model)
    under = base.under(ADA, 0.25)
    size = under.report.bytes_kept
    del base
    assert held(under) == size


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_rows_are_each_their_own(family: str) -> None:
    model = tiny(family)
    base = watched(model)
    caches = [base.under(method, keep) for method in (SNAP, ADA, METHODS["knorm"]) for keep in (0.25, 0.5)]
    caches += [base.under("full", 1.0), base.under(MORE_METHODS["streaming-llm in cache"], 0.25)]
    stacked = fewer.Cache.stack(caches)
    assert stacked.get_seq_length() == 40
    rows = len(caches)
    got = cached(model, stacked, *(ids.repeat(rows, 1) for ids in turns()[1:]))
    for row, cache in enumerate(caches):
        for together, alone in zip(got, cached(model, cache, *turns()[1:]), strict=True):
            assert_close(together[row], alone[0])
    for index in ours(stacked):
        kept = stacked.report.layers[index].kept
        assert kept == tuple(cache.report.layers[index].kept[0] for cache in caches)


def test_stacked_rows_hold_their_own_bytes() -> None:
    model = tiny("llama")
    base = watched(model)
    stacked = fewer.Cache.stack([base.under(ADA, 0.25), base.under(SNAP, 0.5)])
    assert held(stacked) == stacked.report.bytes_kept
    assert stacked.report.bytes_full == 2 * base.report.bytes_full


def test_stacking_different_lengths_is_refused() -> None:
    model = tiny("llama")
    caches = [fewer.Cache(model, SNAP, 0.5) for _ in range(2)]
    for n, cache in zip((30, 31), caches, strict=True):
        cached(model, cache, prompt(n))
    with pytest.raises(fewer.FewerError, match="different numbers of tokens"):
        fewer.Cache.stack(caches)


@pytest.mark.parametrize("when", ["prefill", "decode", "both"])
def test_freeze_compresses_no_more(when: Any) -> None:
    model = tiny("llama")
    cache = fewer.Cache(model, SNAP, 12, when=when, every=1)
    cached(model, cache, prompt(40))
    first = cache.report.layers[0].kept[0][0]
    cache.freeze()
    cached(model, cache, *turns()[1:])
    assert cache.report.layers[0].kept == ((first + 7, first + 7),)
    assert held(cache) == cache.report.bytes_kept


@pytest.mark.parametrize("family", FAMILIES)
def test_forks_go_on_separately(family: str) -> None:
    """Each fork answers as the cache itself would, whatever the others have read, lost or exchanged since."""
    model = tiny(family)
    base = fewer.Cache(model, ADA, 0.5)
    cached(model, base, prompt(40, rows=2))
    kept, report = everything_kept(base), base.report
    first, second, third = base.fork(), base.fork(), base.fork()
    following = [ids.repeat(2, 1) for ids in turns()[1:]]
    got = cached(model, first, *following)
    cached(model, second, prompt(2, rows=2, seed=7))
    second.reorder_cache(torch.tensor([1, 0]))
    for index in ours(third):
        third.layers[index].crop(-9)
    assert everything_kept(base) == kept and base.report == report
    for again, want in zip(cached(model, base.fork(), *following), got, strict=True):
        assert torch.equal(again, want)
    base.freeze()
    for again, want in zip(cached(model, base, *following), got, strict=True):
        assert torch.equal(again, want)


def test_a_fork_reports_what_it_holds_and_why() -> None:
    model = tiny("llama")
    base = fewer.Cache(model, "snapkv", 0.5)
    with pytest.warns(fewer.FewerWarning, match="kept whole"):
        cached(model, base, prompt(40))
    fork = base.fork()
    assert fork.report.layers[0].kept == base.report.layers[0].kept
    assert fork.report.notes == base.report.notes
    assert held(fork) == fork.report.bytes_kept
