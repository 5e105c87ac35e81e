"""Saved caches: as they were, with their method and positions, and refused when they are not what they say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewer
from fewer.adapters.hf_save import FORMAT, VERSION
from fewer.types import FewerError
from tests.adapters.common import FAMILIES, MORE_METHODS, SNAP
from tests.adapters.emulate import ours
from tests.tiny import prompt, tiny


def answer(model: Any, cache: Any, turn: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """One more turn on a cache, and greedy tokens after it, as logits."""
    logits = [model(turn, past_key_values=cache).logits[:, -1]]
    for _ in range(steps):
        logits.append(model(logits[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o", "streaming-llm in cache"])
@torch.no_grad()
def test_a_loaded_cache_goes_on_with_the_same_logits(family: str, method: str, tmp_path: Path) -> None:
    model = tiny(family)
    with fewer.Cache(model, MORE_METHODS[method], 0.5) as cache:
        model(prompt(40), past_key_values=cache)
        cache.save(tmp_path / "cache")
        report, expected = cache.report, answer(model, cache, prompt(7, seed=3))
    with fewer.Cache.load(model, tmp_path / "cache") as loaded:
        again = loaded.report
        assert [layer.kept for layer in again.layers] == [layer.kept for layer in report.layers]
        assert (again.method, again.keep) == (report.method, report.keep)
        for index in ours(cache):  # sliding-window layers of transformers hold more than they show, until saved
            assert again.layers[index].bytes_kept == report.layers[index].bytes_kept
        assert torch.equal(answer(model, loaded, prompt(7, seed=3)), expected)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "expected-attention"])
@torch.no_grad()
def test_a_cache_that_goes_on_compressing_does_so_after_loading(method: str, tmp_path: Path) -> None:
    model, logits = tiny("llama"), []
    with fewer.Cache(model, MORE_METHODS.get(method, method), 20, when="both", every=4) as cache:
        model(prompt(40), past_key_values=cache)
        answer(model, cache, prompt(7, seed=3), steps=2)  # two steps into the next four
        cache.save(tmp_path / "cache")
        logits.append(answer(model, cache, prompt(1, seed=4), steps=9))
    with fewer.Cache.load(model, tmp_path / "cache") as loaded:
        logits.append(answer(model, loaded, prompt(1, seed=4), steps=9))
        assert loaded.report.layers[0].kept == cache.report.layers[0].kept
    assert torch.equal(*logits)


@torch.no_grad()
def test_rows_of_different_lengths_and_what_is_not_cut_yet(tmp_path: Path) -> None:
    model = tiny("qwen2")
    ids, real = prompt(12, rows=2), torch.ones(2, 12, dtype=torch.long)
    real[0, :2] = 0
    for keep, more in ((1.0, 0), (0.5, 0), (0.5, 3)):
        with fewer.Cache(model, SNAP, keep) as cache:
            model(ids, attention_mask=real, past_key_values=cache)
            mask = real
            for step in range(more):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                model(prompt(1, rows=2, seed=step), attention_mask=mask, past_key_values=cache)
            cache.save(tmp_path / "cache")
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            expected = model(prompt(1, rows=2, seed=9), attention_mask=mask, past_key_values=cache).logits
        with fewer.Cache.load(model, tmp_path / "cache") as loaded:
            assert torch.equal(
                model(prompt(1, rows=2, seed=9), attention_mask=mask, past_key_values=loaded).logits, expected
            )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny("llama")
    with torch.no_grad(), fewer.Cache(model, SNAP, 0.5) as cache:
        model(prompt(40), past_key_values=cache)
        cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_truncated_file_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:length])
        with pytest.raises(FewerError, match=r"damaged|no saved cache"):
            fewer.Cache.load(tiny("llama"), saved)


def test_a_tampered_file_is_refused(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[-3] ^= 1
    saved.write_bytes(data)
    with pytest.raises(FewerError, match="damaged"):
        fewer.Cache.load(tiny("llama"), saved)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a cache")
    save_file({"a": torch.ones(3)}, tmp_path / "tensors")
    for name in ("text", "tensors"):
        with pytest.raises(FewerError, match="no saved cache"):
            fewer.Cache.load(tiny("llama"), tmp_path / name)
    with pytest.raises(FewerError, match="cannot be read"):
        fewer.Cache.load(tiny("llama"), tmp_path / "missing")


def test_another_model_is_refused(saved: Path) -> None:
    other = tiny("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(FewerError, match="another model"):
        fewer.Cache.load(other, saved)
    with pytest.raises(FewerError, match="another model"):
        fewer.Cache.load(tiny("qwen2"), saved)
    for setting in ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rms_norm_eps": 0.1}):
        with pytest.raises(FewerError, match="other settings of the same ones"):  # whose keys are others
            fewer.Cache.load(tiny("llama", **setting), saved)


@torch.no_grad()
def test_a_head_is_no_part_of_what_a_cache_is_for(saved: Path) -> None:
    model, more = tiny("llama"), prompt(3, seed=7)
    with fewer.Cache.load(model.base_model, saved) as cache, fewer.Cache.load(model, saved) as whole:
        states = model.base_model(more, past_key_values=cache).last_hidden_state
        assert torch.equal(model.lm_head(states), model(more, past_key_values=whole).logits)


def test_a_class_that_is_not_known_is_refused(saved: Path) -> None:
    """With the checksum made to fit, so that only the list of classes stands between the file and the class."""
    from fewer import files

    head, tensors = files.read(saved, FORMAT, VERSION, "saved cache")
    head["cache"] = head["cache"].replace("fewer.ragged.Ragged", "subprocess.Popen")
    files.write(saved, load_file(saved) and tensors, head)
    with pytest.raises(FewerError, match=r"subprocess\.Popen"):
        fewer.Cache.load(tiny("llama"), saved)


def test_a_method_of_the_users_own_says_why_it_cannot_be_saved(tmp_path: Path) -> None:
    class Mine(type(SNAP)):  # type: ignore[misc]
        pass

    model = tiny("llama")
    with torch.no_grad(), fewer.Cache(model, Mine(window=8), 0.5) as cache:
        model(prompt(40), past_key_values=cache)
        with pytest.raises(FewerError, match=r"cannot be saved: .*Mine"):
            cache.save(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
