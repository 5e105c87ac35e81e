"""What the commands share: where they print, options that many take, and files read and written with errors that say
enough."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewer.types import Budget, BudgetError, FewerError, Keep


class Out(Console):
    """A console on standard output that says when that cannot be written."""

    def print(self, *said: Any, **how: Any) -> None:
        with stdout():
            super().print(*said, **how)


out = Out(width=None if sys.stdout.isatty() else 140)  # in a pipe, wide enough for the tables
err = Console(stderr=True, soft_wrap=True)  # a line that a program or a person searches stays one line

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON and print nothing else to stdout.")]
ModelName = Annotated[str, typer.Option("--model", help="A path, a hub name, or 'default'.")]


def print_json(said: Any) -> None:
    """One line of JSON, plain: rich would wrap it."""
    print_text(json.dumps(said))


def print_text(text: str) -> None:
    """A text and a line break, as they are."""
    with stdout():
        print(text)  # noqa: T201


@contextmanager
def stdout() -> Iterator[None]:
    """Write to standard output in here; a disk without room is one line and exit code 1."""
    try:
        yield
        sys.stdout.flush()  # what cannot be written is said now, and not when Python ends
    except BrokenPipeError:
        raise  # whoever read has seen enough: click ends without a word
    except OSError as why:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try to write the rest at its end
        err.print(f"fewer: standard output cannot be written ({why.strerror})", style="red", highlight=False)
        raise typer.Exit(1) from None


def read_text(file: Path, option: str) -> str:
    """The text of a file, `-` for standard input, that this option named."""
    try:
        return sys.stdin.buffer.read().decode() if str(file) == "-" else file.read_bytes().decode()
    except OSError as error:
        raise FewerError(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FewerError(f"{option} {file} is not UTF-8 text (byte {error.start})") from None


def check_outputs(
    *places: tuple[str, Path | None], read: Iterable[Path | None] = (), makes_folders: bool = False
) -> None:
    """Refuse, before any work is done, an output that would overwrite what is read or another, or has no room."""
    taken = [(file, "read") for file in read if file is not None]
    for option, place in places:
        if place is None:
            continue
        try:
            for file, use in taken:
                if _same(place, file):
                    raise FewerError(f"{option} {place} is what is {use}; name another file")
            reason = _no_room(place, makes_folders)
        except OSError as why:
            reason = str(why.strerror)
        if reason:
            raise FewerError(f"{option} {place} cannot be written: {reason}")
        taken.append((place, f"written by {option}"))


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file; a device such as /dev/null may well be both."""
    if one.exists() and other.exists():
        return one.is_file() and one.samefile(other)
    return one.resolve() == other.resolve()


def _no_room(place: Path, makes_folders: bool) -> str:
    if place.is_dir():
        return "it is a folder; name a file"
    above = next(folder for folder in place.absolute().parents if folder.exists())
    if not above.is_dir():
        return f"{above} is in the way"
    if not (makes_folders or place.parent.is_dir()):
        return f"there is no folder {place.parent}"
    return "" if os.access(place if place.exists() else above, os.W_OK) else "no right to write there"


def listed(text: str, option: str) -> list[str]:
    """The parts of a comma-separated option."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise FewerError(f"{option} {text!r} names nothing; give one, or several with commas between them")
    return parts


def refuse_empty(given: Mapping[str, str | None]) -> None:
    """Refuse options that were given and hold nothing, as of a shell variable that was never set."""
    for option, text in given.items():
        if text is not None and not text.strip():
            raise FewerError(f"{option} {text!r} is empty; say what it should be, or leave it out")


def read_keep(text: str) -> Keep:
    """A budget as it was typed."""
    _refuse_percent(text)
    return Budget.parse(text).keep


def check_share(text: str, other: str = "") -> None:
    """Refuse a budget that is no share; `other` is what else would work."""
    _refuse_percent(text)
    try:
        share = Budget.parse(text).fraction
    except BudgetError:
        share = None
    if share is None:
        raise BudgetError(f"--keep {text!r}: it is the share that may stay, in (0, 1], such as 0.5{other}")


def _refuse_percent(text: str) -> None:
    if (percent := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)) and 0 < float(percent[1]) <= 100:
        raise BudgetError(f"--keep {text}: write {float(percent[1]) / 100:g}")


def progress(width: int) -> Progress:
    """A bar for each task on stderr: what it is doing, in so many columns, how many are done, and the time."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(TextColumn(f"{{task.description:{width}s}}"), *columns, console=err)
