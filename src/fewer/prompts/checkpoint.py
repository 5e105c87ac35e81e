"""A bulk run's output on disk: written line by line, taken up again, and put in its place at the end.

What was written is its own checkpoint: every line says which line of the input it is of, and that line's digest. So
there is no second record that could fall behind the first, and a line is there whole or is cut off and made again.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from fewer.prompts.bulk import Engine, Item, Outcome, Shortener, items, local
from fewer.types import FewerError


@dataclass(frozen=True)
class Summary:
    """What a run came to: lines written, those of them with an error, those that an earlier run had written, tokens of
    the lines without an error before and after, and bytes of the input that were read (without line ends)."""

    lines: int = 0
    errors: int = 0
    resumed: int = 0
    tokens_before: int = 0
    tokens_after: int = 0
    size: int = 0

    def plus(self, outcome: Outcome) -> "Summary":
        """With one more line."""
        return replace(
            self, lines=self.lines + 1, errors=self.errors + outcome.failed, size=self.size + outcome.size,
            tokens_before=self.tokens_before + outcome.before, tokens_after=self.tokens_after + outcome.after,
        )  # fmt: skip

    def __str__(self) -> str:
        share = self.tokens_after / max(self.tokens_before, 1)
        said = f"{self.lines:,} lines: {self.tokens_before:,} tokens to {self.tokens_after:,} ({share:.1%})"
        said += f"; {self.resumed:,} of them were there from an earlier run" if self.resumed else ""
        return said + (f"; {self.errors:,} could not be shortened, and say why in `error`" if self.errors else "")


Tick = Callable[[Summary], None]


def shorten_lines(
    lines: Iterable[bytes], out: str | Path, shortener: Shortener, engine: Engine = local, *, overwrite: bool = False,
    tick: Tick | None = None, name: str = "the input",
) -> Summary:  # fmt: skip
    """Shorten every line of a JSONL source into the file `out`; see `fewer.prompts.bulk` for both formats.

    Never more of the source is held than the engine has in work. Called again with the same lines and the same settings
    after an interruption, it goes on after the last whole line, and the file is byte for byte what it would have been.

    Args:
        lines: the lines of the source from its start, an open binary file for instance.
        out: appears when all is done; until then `OUT.partial` and `OUT.partial.json` stand beside it.
        shortener: what is done to each line.
        engine: who does it; `fewer.adapters.ray.engine()` for a Ray cluster.
        overwrite: replace `out` if it is there; at the end, and in one step.
        tick: called with the sum so far after every line.
        name: what messages call the source where a line of it is to be mended.

    Raises:
        FewerError: `out` is there already, or cannot be written; a line of the source is none of the kind that is read,
            or the source is empty; the settings are wrong; or what is there of an earlier run has other settings, or is
            of other lines. What was written stays.
    """
    out = Path(out)
    if out.is_dir() or not out.parent.is_dir():
        raise FewerError(
            f"{out} cannot be written: {'it is a folder' if out.is_dir() else f'there is no folder {out.parent}'}"
        )
    if out.exists() and not overwrite:
        raise FewerError(f"{out} is there already; overwrite it (--overwrite), or name another file")
    partial, state = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")
    file = _locked(partial)
    total = Summary()
    try:
        coming = items(lines)
        total = _taken_up(partial, state, coming, shortener)
        _write_settings(state, shortener, total)
        total = replace(total, resumed=total.lines)
        for outcome in engine(shortener, coming):
            if outcome.wrong:
                raise FewerError(f"{outcome.wrong}. {_stays(partial, total, f'line {outcome.number} of {name}')}")
            _append(file, outcome.line, partial, total)
            total = total.plus(outcome)
            if tick is not None:
                tick(total)
        if not total.lines:
            raise FewerError("the input has no lines: one JSON object a line is read, with text or documents")
        _done(file, partial, out, total)
        state.unlink(missing_ok=True)
    finally:
        file.close()
        if partial.exists() and not partial.stat().st_size:  # nothing to go on with
            partial.unlink()
            state.unlink(missing_ok=True)
    return total


def _stays(partial: Path, total: Summary, bad: str = "") -> str:
    """What is there of a run that stopped; `bad` is the line that has to be mended before it can go on."""
    mend = f"; mend {bad}, then the same command goes on there" if bad else ""
    if not total.lines:
        return f"Nothing was written{mend}"
    return f"The {total.lines:,} lines before it are in {partial}{mend or '; the same command goes on after them'}"


def _locked(partial: Path) -> FileIO:
    """The unfinished output, made if it is not there, for this run alone."""
    try:
        file = partial.open("ab", buffering=0)
    except OSError as why:
        raise FewerError(f"{partial} cannot be written ({why.strerror})") from None
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it, however a run may end
        except OSError:
            file.close()
            raise FewerError(f"{partial} is being written by another run; wait for it, or name another file") from None
    return file


def _taken_up(partial: Path, state: Path, coming: Iterator[Item], shortener: Shortener) -> Summary:
    """What an earlier run wrote, held against the input, which is read on behind it; half a line at its end is cut."""
    total, whole = Summary(), 0
    with partial.open("rb") as written:
        for line in written:
            if not line.endswith(b"\n"):
                break
            if not total.lines:
                _same_settings(state, partial, shortener)
            total, whole = total.plus(_checked(line, next(coming, None), total.lines + 1, partial)), whole + len(line)
    os.truncate(partial, whole)
    return total


def _checked(line: bytes, item: Item | None, number: int, partial: Path) -> Outcome:
    """The outcome that a line of output tells of, if it is of this item."""
    try:
        said: dict[str, Any] = json.loads(line)
        mark = (said["line"], said["digest"])
        before, after = (0, 0) if "error" in said else (int(said["tokens_before"]), int(said["tokens_after"]))
    except (ValueError, KeyError, TypeError):
        raise FewerError(
            f"line {number} of {partial} is none that fewer wrote; remove the file to begin anew"
        ) from None
    if item is None or mark != (item.number, item.digest):
        raise FewerError(
            f"line {mark[0]} of the input is not what it was when {partial} was begun; give the input as it was, or "
            f"remove that file to begin anew"
        )
    return Outcome(line, len(item.raw), before, after, failed="error" in said)


def _same_settings(state: Path, partial: Path, shortener: Shortener) -> None:
    now = json.loads(json.dumps(shortener.settings()))
    try:
        then = json.loads(state.read_bytes())
        changed = [name for name in now if now[name] != then[name]]
    except (OSError, ValueError, KeyError, TypeError):
        raise FewerError(f"{state}, the settings of {partial}, cannot be read; remove both to begin anew") from None
    if changed:
        said = ", ".join(f"{name} was {then[name]!r} and is {now[name]!r}" for name in changed)
        raise FewerError(f"{partial} was begun with other settings: {said}; give them as they were, or remove it")


def _write_settings(state: Path, shortener: Shortener, total: Summary) -> None:
    """The settings, before the first line is written; later they are there already."""
    if total.lines:
        return
    try:
        state.write_text(json.dumps(shortener.settings(), indent=1) + "\n", encoding="utf-8")
    except OSError as why:
        raise FewerError(f"{state} cannot be written ({why.strerror})") from None


def _append(file: FileIO, line: bytes, partial: Path, total: Summary) -> None:
    """A line at the end, at once: what is written is there whatever becomes of this process."""
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as why:
        raise FewerError(f"{partial} cannot be written ({why.strerror}). {_stays(partial, total)}") from None


def _done(file: FileIO, partial: Path, out: Path, total: Summary) -> None:
    try:
        os.fsync(file.fileno())
        file.close()
        os.replace(partial, out)
    except OSError as why:
        raise FewerError(f"{out} cannot be written ({why.strerror}). {_stays(partial, total)}") from None
