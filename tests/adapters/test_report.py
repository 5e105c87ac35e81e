"""The report: what was seen, asked and kept, row by row and layer by layer; printable, and plain data."""

import json
from typing import Any

import pytest
import torch

import fewer
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.knorm import KNorm
from tests.adapters.common import ADA, FAMILIES, MORE_METHODS, PAIRS, SNAP, cached, turns
from tests.adapters.emulate import ours
from tests.tiny import prompt, tiny


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_prints_and_is_plain_data(family: str, method: str) -> None:
    model = tiny(family)
    with fewer.compress(model, MORE_METHODS[method], keep=0.5) as run:
        model.generate(prompt(40, rows=2), max_new_tokens=3, do_sample=False)
    report = run.report
    data = json.loads(json.dumps(report.to_dict()))
    assert data["method"] == report.method and data["keep"] == 0.5
    assert len(data["layers"]) == model.config.num_hidden_layers
    assert data["bytes_kept"] == report.bytes_kept == sum(layer["bytes_kept"] for layer in data["layers"])
    assert 0 < report.metadata < report.bytes_kept < report.bytes_full
    assert report.seconds > 0
    lines = str(report).splitlines()
    assert len(lines) == 3 + len(report.layers) + len(report.notes)
    assert data["peak"] == report.peak and f"at most {report.peak:,} bytes" in lines[1]
    assert report.step_seconds > 0 and report.transient == report.residual == 0
    assert f"{report.bytes_kept:,} of {report.bytes_full:,} bytes" in lines[0]


def test_the_peak_is_one_whole_layer_and_what_was_cut_before() -> None:
    """Three layers of 2 heads, 40 tokens of 2 x 16 floats; each is cut to 20 (and their positions) before the next."""
    model, whole, half = tiny("llama"), 2 * 40 * 2 * 16 * 4, 2 * 20 * (2 * 16 * 4 + 4)
    with torch.no_grad(), fewer.Cache(model, SNAP, 0.5) as cache:
        model(prompt(40), past_key_values=cache)
    assert cache.report.peak == whole + 2 * half
    with torch.no_grad(), fewer.Cache(model, "full", 1.0) as cache:
        model(prompt(40), past_key_values=cache)
    assert cache.report.peak == 3 * whole


def test_seen_asked_and_kept_of_each_row() -> None:
    model = tiny("llama")
    real = torch.ones(3, 40, dtype=torch.long)
    real[1, :13], real[2, 30:] = 0, 0
    cache = fewer.Cache(model, ADA, 0.5)
    model(prompt(40, rows=3), attention_mask=real, past_key_values=cache)
    for layer in cache.report.layers:
        assert layer.seen == (40, 27, 30)
        assert layer.asked == (20, 14, 15)
        assert [sum(row) for row in layer.kept] == [40, 28, 30]
        assert layer.bytes_full == 3 * 2 * 40 * 2 * 16 * 4  # the host would hold the padding too
    assert cache.report.kept == pytest.approx((40 + 28 + 30) / (2 * 97))
    wide = torch.cat([real, torch.tensor([[1], [0], [1]])], dim=1)
    model(prompt(1, rows=3), attention_mask=wide, past_key_values=cache)
    assert cache.report.layers[0].seen == (41, 27, 31)
    assert [sum(row) for row in cache.report.layers[0].kept] == [42, 28, 32]


def test_uneven_heads_are_shown() -> None:
    model = tiny("gpt_neox")
    with fewer.Cache(model, ADA, 0.25) as cache:
        cached(model, cache, prompt(80))
        counts = cache.report.layers[1].kept[0]
        assert len(set(counts)) > 1
        assert f"{min(counts)}-{max(counts)}" in str(cache.report)


def test_states_before_after_and_without_compressing() -> None:
    model = tiny("gemma3_text")
    cache = fewer.Cache(model, SNAP, 0.5, when="decode", every=2)
    empty = cache.report
    assert [layer.state for layer in empty.layers] == ["left alone", "whole"] * 2
    assert empty.bytes_kept == empty.bytes_full == 0 and empty.kept == 1.0
    assert str(empty)
    states = []
    for ids in (prompt(40), prompt(1), prompt(1)):
        cached(model, cache, ids)
        states.append(cache.report.layers[1].state)
    assert states == ["whole", "whole", "compressed"]


@pytest.mark.parametrize(("keep", "shown"), [(0.25, "0.25"), (12, "12"), ("20KB", "20KB"), (1, "1")])
def test_the_budget_is_shown_as_it_was_asked(keep: Any, shown: str) -> None:
    model = tiny("llama")
    with fewer.Cache(model, "knorm", keep) as cache:
        cached(model, cache, prompt(40))
        assert str(cache.report).startswith(f"knorm keep={shown}: kept ")
        assert cache.report.keep == keep


def test_names_of_methods() -> None:
    model = tiny("llama")
    for method, name in (("knorm", "knorm"), (KNorm(), "knorm"), (AdaKV(KNorm()), "adakv")):
        with fewer.Cache(model, method, 0.5) as cache:
            cached(model, cache, prompt(40))
            assert cache.report.method == name


def test_a_report_is_a_picture_of_its_moment() -> None:
    model = tiny("llama")
    with fewer.Cache(model, SNAP, 0.5) as cache:
        cached(model, cache, prompt(40))
        then = cache.report
        cached(model, cache, *turns()[1:])
        assert then.layers[0].seen == (40,) and cache.report.layers[0].seen == (47,)
        assert hash(then) != hash(cache.report)


def test_there_is_none_before_anything_ran() -> None:
    model = tiny("llama")
    with (
        fewer.compress(model, SNAP, keep=0.5) as run,
        pytest.raises(fewer.FewerError, match="run the model inside the context first"),
    ):
        str(run.report)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_full_are_what_transformers_holds(family: str) -> None:
    from transformers import DynamicCache

    model = tiny(family)
    host, mine = DynamicCache(config=model.config), fewer.Cache(model, SNAP, 0.25)
    cached(model, host, *turns()), cached(model, mine, *turns())
    for index in ours(mine):
        theirs = host.layers[index]
        assert mine.report.layers[index].bytes_full == theirs.keys.nbytes + theirs.values.nbytes
