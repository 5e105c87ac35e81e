"""docs/choose.md: every command in it can be typed as it is."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from fewer.cli import app
from fewer.methods import METHODS, of_family, resolve, resolve_prompt
from fewer.types import FewerError

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "choose.md").read_text(encoding="utf-8")
MAIN = typer.main.get_command(app)


def commands(page: str) -> list[str]:
    """What begins with `fewer`, in a block of code or between backquotes, and names a command."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.S))]
    return list(dict.fromkeys(text for text in [*lines, *spans] if text.startswith("fewer ")))


def parsed(text: str) -> dict[str, object]:
    """The options of a command, as the command line itself reads them.

    Raises:
        Exception: the command line's own; there is no such command or option, or a value is of the wrong kind.
    """
    _, name, *words = shlex.split(text)
    group: Any = MAIN
    with group.make_context("fewer", [name, *words]) as outer:
        command = group.get_command(outer, name)
        if command is None:
            raise LookupError(f"there is no command {name}")
        if not words:  # its name alone, in a sentence
            return {}
        with command.make_context(name, list(words), parent=outer) as context:
            return dict(context.params)


def test_the_page_is_short_and_has_the_commands() -> None:
    assert len(PAGE.splitlines()) <= 90 and len(commands(PAGE)) >= 10
    named = {text.split()[1] for text in commands(PAGE)}
    assert {"doctor", "generate", "prompt", "image", "serve", "tune"} <= named


@pytest.mark.parametrize("text", commands(PAGE))
def test_a_command_can_be_typed(text: str) -> None:
    options = parsed(text)
    method = options.get("method")
    if isinstance(method, str):
        (resolve_prompt if method in of_family("prompt") else resolve)(method)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("fewer squeeze --keep 0.5", "no command squeeze"),
        ("fewer prompt doc.txt --keap 0.5", "No such option"),
        ("fewer serve --port lots", "valid integer"),
    ],
)
def test_a_wrong_command_is_seen(text: str, why: str) -> None:
    assert commands(f"see `{text}`") == commands(f"```\n{text}\n```") == [text]
    with pytest.raises(Exception, match=why):
        parsed(text)


def test_a_wrong_method_is_seen() -> None:
    with pytest.raises(FewerError, match="there is no method"):
        resolve(str(parsed("fewer generate text --method snapkw")["method"]))


def test_methods_named_in_the_text_are_known() -> None:
    for name in ("kvzap", "llmlingua2", "turbo", "uniform", "random"):
        assert name in METHODS and name in PAGE


def test_links_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-") for line in re.findall(r"^## .*", PAGE, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert target[1:] in anchors if target.startswith("#") else (DOCS / target).exists(), target
