"""`fewer prompt --in FILE --out FILE`: many prompts, on this machine or on a Ray cluster."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from fewer.cli.common import check_outputs, err, out, print_json
from fewer.prompts.bulk import Engine, Shortener, local
from fewer.prompts.checkpoint import Summary, shorten_lines
from fewer.types import FewerError, UnknownName

ENGINES = ("local", "ray")


def engine_of(name: str) -> Engine:
    """The engine of that name."""
    if name not in ENGINES:
        raise UnknownName(f"--engine {name!r}: known are {', '.join(ENGINES)}")
    if name == "local":
        return local
    from fewer.adapters.ray import engine

    return engine()


def shorten_file(
    source: Path, target: Path, shortener: Shortener, engine: Engine, overwrite: bool, as_json: bool
) -> None:
    """Shorten every line of a JSONL file; the bar goes to stderr, what it came to to stdout.

    Raises:
        typer.Exit: 1 where lines could not be shortened, 130 where it was interrupted.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if str(target) == "-":
        raise FewerError("--out -: what is interrupted goes on from a file; name one")
    check_outputs(("--out", target), ("--out", Path(f"{target}.partial")), read=[source])
    said = TextColumn("{task.fields[said]}")
    columns = (said, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        # what Ray says of workers that died, it says to stdout, which holds nothing but what it came to
        with redirect_stdout(sys.stderr), _opened(source) as lines, Progress(*columns, console=err) as progress:
            whole = source.stat().st_size if str(source) != "-" else None
            bar = progress.add_task("", total=whole, said="loading")

            def tick(total: Summary) -> None:
                errors = f", {total.errors:,} with errors" if total.errors else ""
                progress.update(bar, completed=total.size, said=f"{total.lines:,} lines{errors}")

            name = "the input" if whole is None else str(source)
            summary = shorten_lines(
                _read(lines, source), target, shortener, engine, overwrite=overwrite, tick=tick, name=name
            )
            progress.update(bar, completed=whole or summary.size, total=whole or summary.size)
    except KeyboardInterrupt:
        err.print(f"interrupted; the same command goes on where {target}.partial ends", highlight=False, markup=False)
        raise typer.Exit(130) from None
    if as_json:
        print_json({"out": str(target), **asdict(summary)})
    else:
        out.print(f"{summary}; wrote {target}", highlight=False, markup=False, soft_wrap=True)
    if summary.errors:
        raise typer.Exit(1)


def _opened(source: Path) -> Any:
    try:
        return nullcontext(sys.stdin.buffer) if str(source) == "-" else source.open("rb")
    except OSError as why:
        raise FewerError(f"--in {source}: {why.strerror}") from None


def _read(lines: Any, source: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except OSError as why:
        raise FewerError(f"--in {source}: {why.strerror}") from None
