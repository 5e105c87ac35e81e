"""`fewer doctor`: what it finds, and that nothing which is missing or broken stops it."""

import builtins
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fewer import doctor, machine
from fewer.doctor import EXTRAS, Examined, examine
from fewer.gains import Facts, gains
from fewer.machine import Finding, tried
from fewer.models import default_model_path
from fewer.sentences import default_sentence_encoder_path
from fewer.vision import default_vision_model_path
from tests.front.test_cli import fewer

__all__ = ["fewer"]

STATES = {"ok", "missing", "broken", "no"}


@pytest.fixture(scope="module")
def found() -> Examined:
    return examine()


def state(findings: tuple[Finding, ...]) -> dict[str, str]:
    return {one.name: one.state for one in findings}


def test_what_is_here(found: Examined) -> None:
    said = {one.name: one.detail for one in found.versions}
    assert said["torch"] == torch.__version__ and said["transformers"] == transformers.__version__
    assert set(state(found.versions).values()) == {"ok"}
    assert state(found.devices)["cpu"] == "ok" and "cores usable" in found.devices[0].detail
    assert (state(found.devices)["cuda"] == "ok") == torch.cuda.is_available()
    kernels = state(found.attention)
    assert kernels["sdpa math, cpu"] == "ok" and kernels["sdpa efficient, cpu"] == "no"
    assert [one.state for one in found.models][-1] == "ok"
    for group in (found.versions, found.extras, found.devices, found.attention, found.compiling, found.models):
        assert group and {one.state for one in group} <= STATES and all(one.detail for one in group)


def test_the_extras_are_those_of_the_project(found: Examined) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    part = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    named = re.findall(r"^([\w-]+) = \[", part, re.M)
    assert set(EXTRAS) == set(named) - {"dev", "bench", "frameworks"}
    assert [one.name for one in found.extras] == list(EXTRAS)
    assert all(one.fix.startswith("pip install") for one in found.extras if one.state != "ok")


WANTED = ["here>=1 ; extra == 'timm'", "gone>=1 ; extra == 'ray'", 'ill-one[x]<2 ; extra == "serve"', "numpy>=1"]


@pytest.mark.parametrize("fault", ["raise OSError('libill.so: cannot open')", "import no_such_module", "1 / 0", "(((("])
def test_missing_and_broken_extras(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    def version(name: str) -> str:
        if name not in ("here", "ill-one"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    (tmp_path / "here.py").write_text("")
    (tmp_path / "ill_one.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: WANTED)
    monkeypatch.setattr(importlib.metadata, "version", version)
    extras = {one.name: one for one in doctor._extras()}
    sys.modules.pop("here", None)
    assert extras["timm"].state == "ok"
    assert extras["ray"].state == "missing" and "gone not installed" in extras["ray"].detail
    assert extras["ray"].fix == "pip install 'fewer[ray]'"
    assert extras["serve"].state == "broken" and "ill-one cannot be imported" in extras["serve"].detail
    assert extras["code"].state == "missing" and "without this extra" in extras["code"].detail


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    (only,) = doctor._extras()
    assert only.state == "missing" and "not installed as a package" in only.detail


def test_pictures_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("PIL"):
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "fewer.vision")
    monkeypatch.setattr(builtins, "__import__", without)
    models = {one.name: one for one in doctor._models()}
    assert models["vision model"].state == "missing" and models["vision model"].detail == "PIL is not installed"
    assert models["vision model"].fix == "pip install 'fewer[eval]'" and models["language model"].state == "ok"


def test_a_failing_look_is_a_finding() -> None:
    def fails(error: BaseException):
        def look() -> str:
            raise error

        return look

    assert tried("x", lambda: "fine") == Finding("x", "ok", "fine")
    assert tried("x", fails(ModuleNotFoundError("m", name="m")), "pip") == Finding(
        "x", "missing", "m is not installed", "pip"
    )
    assert tried("x", fails(RuntimeError("")), "f") == Finding("x", "broken", "RuntimeError: no reason given", "f")
    assert tried("x", fails(RuntimeError("a\nb")), broken="no") == Finding("x", "no", "a")
    with pytest.raises(KeyboardInterrupt):  # who stops it, stops it
        tried("x", fails(KeyboardInterrupt()))


def test_default_models_are_where_they_are_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The names of the folders are those that the models themselves are kept under."""
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(doctor, "_absent", lambda name: True)
    assert all("is not here; pip brings" in one.detail for one in doctor._models()[:3])
    assert not (tmp_path / "empty").exists()  # nothing was fetched
    from fewer.models import SMOLLM2
    from fewer.sentences import MINILM
    from fewer.vision import DINOV2

    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    (tmp_path / f"smollm2-135m-instruct-transformers-{transformers.__version__}").mkdir()
    (tmp_path / f"{MINILM.name}-{MINILM.version}").mkdir()
    (tmp_path / f"dinov2-vit-s14-{DINOV2.name}-{DINOV2.version}").mkdir()
    language, vision, sentences, _ = doctor._models()
    assert "is ready" in language.detail and "is ready" in vision.detail and "on first use" in sentences.detail
    assert default_model_path().parent == default_vision_model_path().parent == tmp_path
    (tmp_path / f"minilm-l6-v2-unpacked-{MINILM.version}").mkdir()
    assert default_sentence_encoder_path().parent == tmp_path and "is ready" in doctor._models()[2].detail
    assert SMOLLM2.name


@pytest.mark.parametrize(("tool", "header", "said"), [(None, True, "no C++ compiler"), ("/x/g++", False, "but no")])
def test_compiling_wants_a_compiler_and_headers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str | None, header: bool, said: str
) -> None:
    (tmp_path / "Python.h").touch()
    include = tmp_path if header else tmp_path / "nowhere"
    monkeypatch.setattr(machine.shutil, "which", lambda name: tool)
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(include)})
    (only,) = machine.compiling()
    assert only.state == "missing" and said in only.detail and only.fix


def test_gains_follow_from_the_machine() -> None:
    plain, fast, gpu = gains(Facts()), gains(Facts(native_bfloat16=True)), gains(Facts(accelerator=True))
    pays = [{gain.way: gain.pays for gain in found} for found in (plain, fast, gpu)]
    assert [found["bfloat16"] for found in pays] == ["in part", "yes", "yes"]
    assert [found["a cache in fewer bits"] for found in pays] == ["in part", "in part", "not measured"]
    assert [found["fused attention of an accelerator"] for found in pays] == ["no", "no", "not measured"]
    assert all(found["shorter prompts"] == "yes" for found in pays)
    # measured numbers are in docs/, with the machine that they are of
    assert not any(re.search(r"\d\.\d|\d ?%|\d ms", gain.why) for found in (plain, gpu) for gain in found)


def test_the_command(fewer, monkeypatch: pytest.MonkeyPatch, found: Examined) -> None:
    def refuse(*words: Any, **more: Any) -> None:
        raise RuntimeError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)  # pip is a process
    code, out, _ = fewer("doctor", "--json")
    said = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and list(said) == list(found.to_dict())
    monkeypatch.setattr(doctor, "examine", lambda: found)
    code, out, _ = fewer("doctor")
    assert code == 0 and torch.__version__ in out and "what can gain here" in out and "[green]" not in out
    assert "pip install 'fewer[" in out or all(one.state == "ok" for one in found.extras)
