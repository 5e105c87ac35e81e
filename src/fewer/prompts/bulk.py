"""Many prompts: JSONL in, JSONL out, a line at a time; what was interrupted goes on after its last whole line.

A line of the input is an object with `text` (a string) or `documents` (strings); `question` and `instruction`, where it
has them, go before those of the settings. A line of the output has all other fields as they were, and

    text, tokens_before, tokens_after, method     the shortened text, its tokens, who shortened it
    error                                         in place of these, where it could not be shortened: why
    patch                                         if asked for: what `fewer.restore` wants beside the text
    notes                                         remarks of the method, where there are any
    line, digest                                  the line of the input, from 1, and the start of its sha256

Lines come out in the order of the input, whoever shortens them, and none says when or where that was. So two runs write
the same bytes (of methods that run a model, as far as its sums are the same: other processors and numbers of threads
round differently). Blank lines have no output. While it runs, the output is `OUT.partial`, and `OUT.partial.json` holds
the settings; at the end it becomes OUT in one step.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, NamedTuple, NoReturn

import regex

from fewer.prompts.compression import Compression
from fewer.prompts.front import compress_prompt, read_text
from fewer.prompts.protect import literal, named, pattern
from fewer.prompts.source import PromptMethod
from fewer.types import FewerError, Keep

OURS = ("line", "digest", "method", "tokens_before", "tokens_after", "patch", "notes", "error")
"""Fields that the output has of its own, so that the input must not bring them."""

_TRIAL = "The sky is blue and the sea is deep. A second sentence follows the first."


class Item(NamedTuple):
    """A line of the input: its number, from 1, and its bytes."""

    number: int
    raw: bytes

    @property
    def digest(self) -> str:
        """What tells, when a run goes on, that the line is still the same: 64 bits of its sha256."""
        return hashlib.sha256(self.raw).hexdigest()[:16]


class Outcome(NamedTuple):
    """What became of an item: a line of output, or what is wrong with the input, where nothing can go on,
    and the number of that line.

    `size` is the item's length in bytes; `before` and `after` are tokens, 0 where `failed` (the line says why).
    """

    line: bytes
    size: int
    before: int = 0
    after: int = 0
    failed: bool = False
    wrong: str = ""
    number: int = 0


class BadLine(FewerError):
    """A line of the input that is none of the kind that is read."""


@dataclass(frozen=True)
class Shortener:
    """What is done to every line. All but a method that is no name is plain data.

    Args:
        method, keep, tokens, tokenizer: as `fewer.compress_prompt` takes them.
        question, instruction: for lines that have none of their own.
        protect: strings that stay; protect_regex: what matches stays; protect_class: names such as "numbers".
        patches: put into each line what `fewer.restore` wants.

    >>> shortener = Shortener("truncation", tokens=7, tokenizer="characters")
    >>> json.loads(shortener(Item(1, b'{"text": "one two three", "id": 7}')).line)["text"]
    'one two'
    """

    method: str | PromptMethod = "llmlingua2"
    keep: Keep | None = None
    tokens: int | None = None
    question: str | None = None
    instruction: str | None = None
    protect: tuple[str, ...] = ()
    protect_regex: tuple[str, ...] = ()
    protect_class: tuple[str, ...] = ()
    tokenizer: str = "default"
    patches: bool = False

    def __call__(self, item: Item) -> Outcome:
        """The output of one line: with an `error` where it cannot be shortened, `wrong` where it cannot be read.

        Raises:
            RuntimeError: the method has a fault.
        """
        try:
            given, prompt = _read(item)
        except BadLine as why:
            return Outcome(b"", len(item.raw), wrong=str(why), number=item.number)
        carried = {name: value for name, value in given.items() if name not in ("text", "documents")}
        mark = {"line": item.number, "digest": item.digest}
        try:
            done = self._shortened(prompt, given)
        except FewerError as why:
            return Outcome(_line({**carried, "error": str(why), **mark}), len(item.raw), failed=True)
        except Exception as why:
            raise RuntimeError(f"line {item.number} of the input: the method failed ({why!r})") from why
        said = {
            "text": done.text, "tokens_before": done.tokens_before, "tokens_after": done.tokens_after,
            "method": done.method, **({"notes": list(done.notes)} if done.notes else {}),
            **({"patch": done.patch()} if self.patches else {}),
        }  # fmt: skip
        return Outcome(_line({**carried, **said, **mark}), len(item.raw), done.tokens_before, done.tokens_after)

    def _shortened(self, prompt: str | list[str], given: dict[str, Any]) -> Compression:
        return compress_prompt(
            prompt, self.method, keep=self.keep, tokens=self.tokens, question=given.get("question") or self.question,
            instruction=given.get("instruction") or self.instruction, protect=self.rules, tokenizer=self.tokenizer,
        )  # fmt: skip

    @cached_property
    def rules(self) -> list[Any]:
        """What must stay, as `compress_prompt` takes it."""
        try:
            patterns = [pattern(regex.compile(text)) for text in self.protect_regex]
        except regex.error as why:
            raise FewerError(f"protect_regex={why.pattern!r} is no regular expression: {why}") from None
        return [*map(literal, self.protect), *patterns, *map(named, self.protect_class)]

    def ready(self) -> None:
        """Load what the method and the tokenizer need, and try them once.

        Raises:
            FewerError: the settings are wrong, whatever the lines may be.
        """
        self.rules  # noqa: B018  # made here, so that it is refused here
        tokens = None if self.tokens is None else min(self.tokens, 8)  # fewer than the trial has: else nothing is tried
        read_text(self.instruction, "instruction")
        compress_prompt(
            _TRIAL,
            self.method,
            keep=self.keep,
            tokens=tokens,
            question=self.question or "What?",
            tokenizer=self.tokenizer,
        )

    def settings(self) -> dict[str, Any]:
        """Everything that the output depends on, as plain data."""
        from fewer import __version__

        fit = getattr(getattr(self.method, "fit", None), "digest", None)
        return {
            "method": self.method if isinstance(self.method, str) else repr(self.method), "fit": fit,
            "keep": None if self.keep is None else str(self.keep), "tokens": self.tokens, "question": self.question,
            "instruction": self.instruction, "protect": list(self.protect), "protect_regex": list(self.protect_regex),
            "protect_class": list(self.protect_class), "tokenizer": self.tokenizer, "patches": self.patches,
            "fewer": __version__,
        }  # fmt: skip


Engine = Callable[[Shortener, Iterator[Item]], Iterator[Outcome]]
"""Who shortens: takes items as it needs them, and gives their outcomes in the same order."""


def local(shortener: Shortener, items: Iterator[Item]) -> Iterator[Outcome]:
    """One line after another, in this process."""
    shortener.ready()
    return map(shortener, items)


def items(lines: Iterable[bytes]) -> Iterator[Item]:
    """The lines of the input that are not blank, numbered from 1."""
    for number, raw in enumerate(lines, 1):
        bare = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw  # some editors put a mark there
        if stripped := bare.strip():
            yield Item(number, stripped)


def _read(item: Item) -> tuple[dict[str, Any], str | list[str]]:
    """The fields of a line, and what is to be shortened."""
    where = f"line {item.number} of the input"
    try:
        given = json.loads(item.raw.decode(), object_pairs_hook=_once, parse_constant=_no_number, parse_float=finite)
    except UnicodeDecodeError as why:
        raise BadLine(f"{where} is not UTF-8 text (byte {why.start})") from None
    except json.JSONDecodeError as why:
        raise BadLine(f"{where} is not JSON: {why.msg} at column {why.colno}") from None
    except (ValueError, RecursionError) as why:
        raise BadLine(f"{where} is not JSON that can be read: {why}") from None
    if not isinstance(given, dict):
        raise BadLine(f"{where} is no JSON object; give one with text, or documents")
    if taken := [name for name in OURS if name in given]:
        raise BadLine(f"{where} has a field {taken[0]!r}, which the output has of its own; give it another name")
    if ("text" in given) == ("documents" in given):
        has = "both text and" if "text" in given else "neither text nor"
        raise BadLine(f"{where} has {has} documents; give one of them")
    documents = given.get("documents")
    if "text" in given and not isinstance(given["text"], str):
        raise BadLine(f"{where}: text is {type(given['text']).__name__}, not a string")
    if "text" not in given and not (isinstance(documents, list) and all(isinstance(one, str) for one in documents)):
        raise BadLine(f"{where}: documents is no list of strings")
    for name in ("question", "instruction"):
        if not isinstance(given.get(name, ""), (str, type(None))):
            raise BadLine(f"{where}: {name} is {type(given[name]).__name__}, not a string")
    return given, given["text"] if "text" in given else given["documents"]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # the last would win, and the others be lost
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return made


def finite(digits: str) -> float:
    return number if isfinite(number := float(digits)) else _no_number(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON can hold")


def _line(fields: dict[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, in a field that is carried through
        return json.dumps(fields).encode() + b"\n"
