"""Assisted decoding reads guesses and crops the wrong ones: it must not change what is kept, nor what is said."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import cache_utils

import fewer
from fewer.methods import of_family
from fewer.methods.kv.kivi import KIVI
from fewer.types import FewerError, FewerWarning
from tests import vlms
from tests.adapters.common import ADA, METHODS, SNAP, decoder
from tests.adapters.emulate import ours
from tests.tiny import prompt, tiny

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{FewerWarning.__module__}.{FewerWarning.__name__}"),
    pytest.mark.skipif(
        not hasattr(cache_utils.Cache, "activate_past_recording"),
        reason="the assisted decoding of older transformers says more than max_new_tokens, with its own cache as well",
    ),
]
PLAIN = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
LOOKUP = {**PLAIN, "prompt_lookup_num_tokens": 3}
REFUSED = ("dapq", "fastkv", "kvzip", "zipvl")  # decide by the prompt while, or when, it has been read
IDS = prompt(20).repeat(1, 4)


def everything_kept(cache: Any) -> list[Any]:
    """Positions that each layer holds in its rows and heads, packed or not."""
    dense = [cache.layers[index]._dense() for index in ours(cache)]
    return [one.positions.masked_fill(one.padding, -1).tolist() for one in dense]


def data(report: Any) -> list[int]:
    """Bytes of keys and values in each layer that fewer holds."""
    return [layer.bytes_kept - layer.metadata for layer in report.layers if layer.state != "left alone"]


@pytest.fixture
def cropped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many guesses were taken back, time after time."""
    gone: list[int] = []
    crop = fewer.Cache.crop

    def counting(self: fewer.Cache, tokens: int) -> None:
        before = self.get_seq_length()
        crop(self, tokens)
        gone.append(before - self.get_seq_length())

    monkeypatch.setattr(fewer.Cache, "crop", counting)
    return gone


def same(model: Any, method: Any, keep: Any, ids: Tensor = IDS, **how: Any) -> None:
    """Double precision, so that reading several tokens at once changes no greedy choice by rounding."""
    with fewer.compress(model, method, keep, **how) as run:
        plain = model.generate(ids, **PLAIN)
        want, held = everything_kept(run.cache), data(run.report)
        assert torch.equal(model.generate(ids, **LOOKUP), plain)
        assert everything_kept(run.cache) == want
        assert data(run.report) == held


@pytest.mark.parametrize("name", [name for name in of_family("kv") if name not in REFUSED])
def test_the_same_tokens_are_said_and_kept(name: str, cropped: list[int]) -> None:
    model, method, keep = decoder(name, dtype=torch.float64, eos_token_id=1)
    same(model, method, keep, when="prefill")
    assert any(cropped), "no guess was wrong"


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("keep", [0.5, 20])
def test_on_other_models(family: str, keep: Any, cropped: list[int]) -> None:
    same(tiny(family, dtype=torch.float64, eos_token_id=1), ADA, keep)
    assert any(cropped)


@pytest.mark.parametrize("method", ["snapkv", "full"])
def test_with_packed_storage(method: str, cropped: list[int]) -> None:
    """Blocks fill while guesses are read, and what is packed cannot be cropped."""
    model = tiny("llama", dtype=torch.float64, eos_token_id=1)
    same(model, METHODS.get(method, method), 1.0 if method == "full" else 0.5, store=KIVI(group=8, residual=8))
    assert any(cropped)


def test_a_cache_of_the_users_own() -> None:
    """Nothing sees the calls of the model: `generate` announces to the cache that it will crop."""
    model = tiny("llama", dtype=torch.float64, eos_token_id=1)
    kept = []
    for how in (PLAIN, LOOKUP):
        with fewer.Cache(model, SNAP, 0.5) as cache:
            model.generate(IDS, past_key_values=cache, **how)
            kept.append(everything_kept(cache))
    assert kept[0] == kept[1]


def test_a_turn_after_an_assisted_answer(cropped: list[int]) -> None:
    """Not one that is assisted too: transformers then reads again what its cache holds, its own cache as well."""
    model = tiny("llama", dtype=torch.float64, eos_token_id=1)
    kept, said = [], []
    for how in (PLAIN, LOOKUP):
        with fewer.compress(model, SNAP, 0.5) as run:
            out = model.generate(IDS, return_dict_in_generate=True, **how)
            turn = torch.cat([out.sequences, IDS[:, :30]], 1)
            said.append(model.generate(turn, past_key_values=out.past_key_values, **PLAIN))
            kept.append(everything_kept(run.cache))
    assert torch.equal(*said) and kept[0] == kept[1]
    assert any(cropped)


@pytest.mark.parametrize("session", [True, False])
def test_a_turn_that_nobody_crops_is_compressed_as_ever(session: bool) -> None:
    model = tiny("llama", dtype=torch.float64, eos_token_id=1)
    kept = []
    for how in (PLAIN, LOOKUP):
        around = fewer.compress(model, SNAP, 0.5) if session else nullcontext()
        with around, fewer.Cache(model, SNAP, 0.5) as cache:
            model.generate(IDS, past_key_values=cache, **how)
            model(IDS[:, :30], past_key_values=cache)
            model(IDS[:, :1], past_key_values=cache)
            kept.append(everything_kept(cache))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("every", [1, 4])
def test_a_budget_while_decoding_holds_after_every_answer(every: int, cropped: list[int]) -> None:
    model = tiny("llama", eos_token_id=1)
    with fewer.compress(model, SNAP, 24, when="both", every=every) as run:
        model.generate(IDS, **LOOKUP)
    assert any(cropped)
    assert max(count for layer in run.report.layers for row in layer.kept for count in row) <= 24 + every - 1


@pytest.mark.parametrize("name", REFUSED)
def test_who_cannot_tell_guesses_says_so(name: str) -> None:
    model, method, keep = decoder(name, eos_token_id=1)
    with fewer.compress(model, method, keep) as run:
        with pytest.raises(FewerError, match="generate without an assistant"):
            model.generate(IDS, **LOOKUP)
        assert run.cache.get_seq_length() == 0
        model.generate(IDS, **PLAIN)
        assert run.report.layers[-1].state == "compressed"


def test_visual_tokens_that_leave_between_layers_are_not_chosen_by_guesses() -> None:
    case = vlms.FAMILIES["llava"]()
    given = case.inputs([1])
    given["input_ids"] = torch.cat([given["input_ids"], given["input_ids"][:, -4:]], 1)  # so the prompt brings a guess
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    case.model.generation_config.eos_token_id = 1
    with fewer.compress(case.model, "fastv", keep=0.5):
        with pytest.raises(FewerError, match="generate without an assistant"):
            case.model.generate(**given, **LOOKUP)
        case.model.generate(**given, **PLAIN)
