"""A budget of its own for every layer, or head, of a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fewer
from fewer.allocate.levels import Levels, levelled
from fewer.methods import name_of, resolve
from fewer.methods.kv.kivi import KIVI
from fewer.types import BudgetError, Tokens
from tests.tiny import prompt, tiny

KEEP = [0.5, 0.25, [0.1, 0.9]]
KEPT = [((100, 100),), ((50, 50),), ((20, 180),)]


@pytest.mark.parametrize(
    "name", ["knorm", "snapkv", "adakv", "pyramidkv", "kvzip", "h2o", "merge-evict", "ems", "tova"]
)
def test_every_layer_and_head_keeps_its_own(name: str) -> None:
    model = tiny("llama")
    with torch.inference_mode(), fewer.compress(model, name, keep=KEEP) as run:
        model(prompt(200))
    assert [layer.kept for layer in run.report.layers] == KEPT
    assert [layer.asked for layer in run.report.layers] == [(100,), (50,), (100,)]
    assert run.report.method == name and run.report.kept == pytest.approx(0.41667, abs=1e-4)


def test_alike_everywhere_is_one_budget() -> None:
    model, ids = tiny("llama"), prompt(150)
    outs = []
    for keep in (0.3, [0.3] * 3, [[0.3, 0.3]] * 3):
        with torch.inference_mode(), fewer.compress(model, "snapkv", keep=keep):
            outs.append(model.generate(ids, max_new_tokens=5, do_sample=False))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    with torch.inference_mode(), fewer.compress(model, "snapkv", keep=[1.0] * 3) as run:
        assert torch.equal(model(ids).logits, model(ids).logits) and run.report.kept == 1


def test_padding_counts_and_storage_and_files(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(100, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    with torch.inference_mode(), fewer.Cache(model, "knorm", [8, 16, [4, 32]]) as cache:
        model(ids, attention_mask=mask, past_key_values=cache)
    assert [layer.kept for layer in cache.report.layers] == [((8, 8), (8, 8)), ((16, 16), (16, 16)), ((4, 32), (4, 32))]
    store = KIVI(group=16, residual=32).store[0]
    with torch.inference_mode(), fewer.Cache(model, "knorm", KEEP, store=store) as packed:
        model(prompt(200), past_key_values=packed)
        packed.save(tmp_path / "cache.st")
        again = fewer.Cache.load(model, tmp_path / "cache.st")
    assert again.report.bytes_kept == packed.report.bytes_kept and [one.kept for one in again.report.layers] == KEPT
    again.release()


def test_the_same_from_a_prefill_that_was_shared() -> None:
    model, ids = tiny("llama"), prompt(200)
    with torch.inference_mode(), fewer.Cache(model, "full") as full:
        model(ids, past_key_values=full)
        assert [layer.kept for layer in full.under("knorm", KEEP).report.layers] == KEPT


def test_what_a_levelled_method_is_asked() -> None:
    made, budget = levelled(resolve("fastkv"), [0.5, 0.25])
    assert isinstance(made, Levels) and budget.fraction == 0.375 and name_of(made) == "fastkv"
    assert callable(made.shortens) and getattr(made, "reads", None) is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(("keep", "mean"), [([0.8, [0.1, 0.3]], 0.5), ([9, [2, 4]], 6), ([0.9, 0.2, [0.1] * 8], 0.4)])
def test_layers_weigh_alike_however_many_heads_they_list(keep: list[Any], mean: float) -> None:
    assert levelled(resolve("knorm"), keep)[1].keep == pytest.approx(mean)


def test_no_more_stays_than_there_is() -> None:
    """Of 40 tokens so far, 12 are left: a half of all, 20, is more than that, and a tenth is 4."""
    made, budget = Levels.of(resolve("knorm"), [[0.5, 0.1]])
    keys, none = torch.randn(1, 2, 12, 4), torch.zeros(1, 2, 12, dtype=torch.bool)
    places = torch.arange(28, 40).expand(1, 2, 12)
    tokens = Tokens(features=keys, positions=places, padding=none, protected=none, seen=torch.tensor([40]))
    assert made.allocate(tokens, made.score(tokens), budget).counts.tolist() == [[12, 4]]


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ([0.5], "has 1 budgets, and 3 layers are shortened"),
        ([0.5, 0.5, [0.1]], None),
        ([0.5, 0.5, [0.1, 0.2, 0.3]], "layer 2 was given 3 budgets, and it has 2 key-value heads"),
        ([0.5, 0.5, 3], "mixes fractions and counts"),
        ([], "give each layer a fraction or a count"),
        ([0.5, 0.5, []], "give each layer a fraction or a count"),
        ([0.5, 0.5, "3MB"], "give each layer a fraction or a count"),
        ([0, 0.5, 0.5], "keep=0 would leave nothing"),
    ],
)
def test_lists_that_cannot_be(keep: list[Any], said: str | None) -> None:
    model = tiny("llama")
    if said is None:  # one for all heads of the layer
        with torch.inference_mode(), fewer.compress(model, "knorm", keep=keep) as run:
            model(prompt(100))
        assert run.report.layers[2].kept == ((10, 10),)
        return
    with pytest.raises(BudgetError, match=said), torch.inference_mode(), fewer.compress(model, "knorm", keep=keep):
        model(prompt(100))
