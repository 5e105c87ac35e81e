"""Who may know whom, what nobody may do, and lists that must equal the tree. Each check has a planted fault."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewer import METHODS

SRC = Path(__file__).parents[2] / "src"


def imports(source: str) -> Iterator[str]:
    """Every module a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


BORDERS = {
    "fewer": ("fewer_eval",),
    "fewer/methods": ("fewer_eval", "fewer.adapters", "fewer.cli", "transformers", "timm"),
    "fewer/score": ("fewer.methods", "fewer.adapters", "transformers"),
    "fewer/allocate": ("fewer.methods", "fewer.adapters", "transformers"),
    "fewer/reduce": ("fewer.methods", "fewer.adapters", "transformers"),
    "fewer/prompts": ("fewer_eval", "fewer.adapters", "fewer.cli", "fewer.methods"),
}
READERS = {"surprise.py", "embed.py", "keepers.py"}
"""Scores that a model of their own gives: they load it, on use, with transformers."""
DOORS = {"front.py", "chat.py"}
"""Where prompts come in: they ask for a method by its name."""


def trespasses(source: str, forbidden: tuple[str, ...]) -> list[str]:
    return [name for name in imports(source) if name.startswith(forbidden)]


@pytest.mark.parametrize("folder", BORDERS)
def test_borders(folder: str) -> None:
    files = sorted((SRC / folder).rglob("*.py"))
    assert files
    for path in files:
        if "cli" in path.parts:  # the command line is where both packages meet
            continue
        freed = "transformers" if path.name in READERS else "fewer.methods" if path.name in DOORS else ""
        forbidden = tuple(name for name in BORDERS[folder] if name != freed)
        assert not trespasses(path.read_text(), forbidden), path


def test_a_trespass_is_seen() -> None:
    assert trespasses("def f():\n    from fewer.adapters import hf_cache", ("fewer.adapters",)) == ["fewer.adapters"]


def dangers(source: str) -> list[str]:
    """Calls to eval or exec, and remote code switched on."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(node.func.id)
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "trust_remote_code" and not off:
                    found.append(keyword.arg)
    return found


def test_no_eval_and_no_remote_code() -> None:
    for path in SRC.rglob("*.py"):
        assert not dangers(path.read_text()), path


@pytest.mark.parametrize("planted", ["eval('1')", "exec(x)", "load(trust_remote_code=True)", "f(trust_remote_code=t)"])
def test_a_danger_is_seen(planted: str) -> None:
    assert dangers(planted)


def test_methods_are_the_files() -> None:
    files = {path.stem for path in (SRC / "fewer/methods").glob("*/*.py") if path.stem != "__init__"}
    assert {cls.__module__.rsplit(".", 1)[1] for cls in METHODS.values()} == files
    assert {name.replace("-", "_") for name in METHODS} == files


@pytest.mark.parametrize("name", METHODS)
def test_a_method_file_is_short_and_tells_its_differences(name: str) -> None:
    path = SRC / (METHODS[name].__module__.replace(".", "/") + ".py")
    text = path.read_text()
    assert len(text.splitlines()) <= 150
    assert "Differs from the paper:" in (ast.get_docstring(ast.parse(text)) or "")
    assert METHODS[name]().card.source


def test_import_is_light_and_silent() -> None:
    """`import fewer` loads no host, opens no connection and prints nothing."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise RuntimeError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import fewer\n"
        "assert 'transformers' not in sys.modules, 'hosts are imported on use'\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
