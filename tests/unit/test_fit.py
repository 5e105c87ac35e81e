"""Fits: what comes back from a file, and what is refused, each with one line that says why."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import fewer
from fewer import files
from fewer.adapters.vlm_cache import OnlyVisual
from fewer.fit import FORMAT, Fit, check, fingerprint, load, save, wants
from fewer.methods.any.full import Full
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.criticalkv import CriticalKV
from fewer.methods.kv.merge_evict import MergeEvict
from fewer.types import FewerError
from tests.tiny import prompt, tiny


def some(method: str = "some", model: str = "0" * 64) -> Fit:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(1.5, dtype=torch.bfloat16)}
    return Fit(method, model, tensors, {"text": "ünïcode", "held out": "0.9"})


@dataclass(frozen=True)
class Fitted(Full):
    """Keeps everything, and wants a fit."""

    fit: Fit | None = None


@dataclass(frozen=True)
class Need:
    """Wants a fit too, and gathers nothing."""

    fit: Fit | None = None
    key_bytes = 0


@dataclass(frozen=True)
class Inside(Full):
    needs: frozenset[Any] = frozenset({Need()})  # type: ignore[misc]


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    fit, path = some(), tmp_path / "some.safetensors"
    save(fit, path)
    again = load(path, "some")
    assert again == fit and hash(again) == hash(fit)
    assert (again.method, again.model, again.notes) == (fit.method, fit.model, fit.notes)
    for name, tensor in fit.tensors.items():
        assert torch.equal(again.tensors[name], tensor) and again.tensors[name].dtype == tensor.dtype
    assert load(path) == fit
    assert [p.name for p in tmp_path.iterdir()] == ["some.safetensors"], "no partial file is left"


def test_the_file_may_go_while_the_fit_is_in_use(tmp_path: Path) -> None:
    fit, path = some(), tmp_path / "some.safetensors"
    save(fit, path)
    again = load(path)
    path.write_bytes(b"")
    assert again == fit


@pytest.mark.parametrize("change", [{"method": "other"}, {"model": "1" * 64}, {"notes": {}}, {"tensors": {}}])
def test_everything_counts_in_equality(change: dict[str, Any]) -> None:
    fit = some()
    assert replace(fit, **change) != fit
    assert fit != "some"


def test_a_number_or_a_shape_counts_too() -> None:
    fit = some()
    for tensor in (fit.tensors["a"] * 1.0000001 + 1e-6, fit.tensors["a"].view(4, 3), fit.tensors["a"].double()):
        assert replace(fit, tensors={**fit.tensors, "a": tensor}) != fit


def refused(path: Path, message: str, method: str | None = "some") -> None:
    with pytest.raises(FewerError, match=message) as caught:
        load(path, method)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x", b"hello, this is text", b"\xff" * 100, b"[]" * 40])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    refused(path, "is no fit")
    refused(tmp_path / "nowhere", "cannot be read")
    refused(tmp_path, "cannot be read")


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    refused(path, "is no fit")
    safetensors.torch.save_file({"w": torch.ones(2)}, path, {"format": "pt"})
    refused(path, "is no fit")


def test_a_file_that_was_cut_short_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "some"
    save(some(), path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for end in (head // 2, head - 1, head, head + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(path, "is no fit" if FORMAT.encode() not in whole[:end] else "is damaged")
    path.write_bytes(whole + b"more")
    refused(path, "is damaged")


def test_one_changed_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "some"
    save(some(), path)
    whole = path.read_bytes()
    for at in range(8 + int.from_bytes(whole[:8], "little"), len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(path, "is damaged")
    for old, new in ((b'"method":"some"', b'"method":"same"'), (b"0000", b"0001"), (b"0.9", b"1.0")):
        path.write_bytes(whole.replace(old, new, 1))
        refused(path, "is damaged")


def test_another_methods_fit_and_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "some"
    save(some("other"), path)
    refused(path, "is a fit of other, not of some")
    files.write(path, some().tensors, {**some().head, "version": "2"})
    refused(path, "of format version 2; this fewer reads 1 only")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(FewerError, match="nowhere"):
        save(some(), tmp_path / "nowhere" / "some")


def test_metadata_is_plain_json(tmp_path: Path) -> None:
    """Any reader of safetensors can say whose fit it is."""
    path = tmp_path / "some"
    save(some(), path)
    with safetensors.safe_open(path, "pt") as file:
        head = file.metadata()
    assert head["method"] == "some" and json.loads(head["notes"])["text"] == "ünïcode"
    assert head["sha256"] == load(path).digest


# --- for which model ---


def test_the_fingerprint_is_the_weights() -> None:
    assert fingerprint(tiny("llama")) == fingerprint(tiny("llama"))
    assert fingerprint(tiny("llama")) == fingerprint(tiny("llama").model), "a head on it changes nothing"
    assert fingerprint(tiny("llama")) == fingerprint(tiny("llama").to(torch.bfloat16)), "nor does half precision"
    others = [tiny("qwen2"), tiny("llama", num_hidden_layers=2), tiny("llama", num_key_value_heads=4)]
    changed = tiny("llama")
    with torch.no_grad():
        changed.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    found = {fingerprint(model) for model in (tiny("llama"), changed, *others)}
    assert len(found) == 5


def test_a_method_is_bound_to_the_model_of_its_fit() -> None:
    model = tiny("llama")
    fit = some(model=fingerprint(model))
    with fewer.compress(model, Fitted(fit), 0.5):
        model(prompt(8))
    with fewer.compress(model, Inside(needs=frozenset({Need(fit)})), 0.5):
        pass
    for other in (Fitted(some()), Inside(needs=frozenset({Need(some())}))):
        with pytest.raises(FewerError, match="was fitted to another model"), fewer.compress(model, other, 0.5):
            pass
    for other in (AdaKV(Fitted(some())), CriticalKV(AdaKV(Fitted(some()))), MergeEvict(Fitted(some()))):
        with pytest.raises(FewerError, match=r"^Fitted was fitted to another"), fewer.compress(model, other, 0.5):
            pass
        with pytest.raises(FewerError, match=r"^Fitted was fitted to another"), fewer.compress(model, other, [0.5] * 3):
            pass
    for other in (Fitted(), Inside(), AdaKV(Inside()), AdaKV(Fitted()), OnlyVisual(Fitted())):
        with pytest.raises(FewerError, match="has to be fitted to the model first"), fewer.compress(model, other, 0.5):
            pass


def test_methods_without_a_place_for_a_fit_are_let_through() -> None:
    check(Full(), tiny("llama"))
    assert not wants(Full()) and wants(Fitted()) and wants(Need())
