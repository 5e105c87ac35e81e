"""What the commands share: where they print, options that many take, and files read with errors that say enough."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewer.types import Budget, FewerError, Keep

out = Console(width=None if sys.stdout.isatty() else 140)  # in a pipe, wide enough for the tables
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON and print nothing else to stdout.")]
ModelName = Annotated[str, typer.Option("--model", help="A path, a hub name, or 'default'.")]


def print_json(said: Any) -> None:
    """One line of JSON, plain: rich would wrap it."""
    print(json.dumps(said))  # noqa: T201


def read_text(file: Path, option: str) -> str:
    """The text of a file, `-` for standard input, that this option named."""
    try:
        return sys.stdin.buffer.read().decode() if str(file) == "-" else file.read_bytes().decode()
    except OSError as error:
        raise FewerError(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FewerError(f"{option} {file} is not UTF-8 text (byte {error.start})") from None


def listed(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [part.strip() for part in text.split(",") if part.strip()]


def read_keep(text: str) -> Keep:
    """A budget as it was typed."""
    return Budget.parse(text).keep


def progress(width: int) -> Progress:
    """A bar for each task on stderr: what it is doing, in so many columns, how many are done, and the time."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn(f"{{task.description:{width}s}}"), *columns, console=err)
