"""A user's own examples: JSON objects, one a line, and their parts that choose, that promise, and that check."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from fewer.prompts.source import DENSE
from fewer.types import FewerError

_SPACED = rf"[\w--[{DENSE}]]"
"""Letters and digits of scripts that put spaces between words."""


@dataclass(frozen=True)
class Example:
    """A context, a question about it, and every string that a right answer has, where that is known.

    `images` are picture files, for models that see; `task` tells kinds of examples apart in reports; `line` is where it
    stood.

    Raises:
        FewerError: `answers` is no tuple of texts that say something; an empty one would be found in every answer.
    """

    context: str
    question: str
    answers: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    task: str = ""
    line: int = 0

    def __post_init__(self) -> None:
        for name, texts in (("answers", self.answers), ("images", self.images)):
            if not isinstance(texts, tuple) or not all(isinstance(one, str) and one.strip() for one in texts):
                raise FewerError(f"Example({name}={texts!r}): give a tuple of texts, such as ('blue',)")

    def score(self, said: str) -> float:
        """The share of the expected strings that an answer says, see `says`."""
        return sum(says(said, answer) for answer in self.answers) / len(self.answers)

    @cached_property
    def key(self) -> str:
        """The same for examples that ask the same."""
        said = json.dumps([self.context, self.question, self.pictures])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """What is in the picture files, and not what they are called; names of those that cannot be read."""
        return tuple(map(_seen, self.images))

    @property
    def stands_on(self) -> tuple[str, ...]:
        """What examples that stand and fall together share: any picture, or without pictures the context."""
        return self.pictures or (self.context,)


def says(text: str, answer: str) -> bool:
    """Whether a text holds an answer, in any case, as whole words and whole numbers.

    >>> says("It is Blue.", "blue"), says("I do not know.", "no"), says("31,250", "1,250"), says("4.5", "4")
    (True, False, False, False)
    >>> says("4.5", ".5"), says("about .5", ".5")
    (False, True)
    >>> says("東京都です", "東京")
    True
    """
    answer = answer.strip().casefold()
    before, after = _edge(answer[0], r"(?<![{0}])", r"(?<!\d[.,])"), _edge(answer[-1], r"(?![{0}])", r"(?![.,]\d)")
    if regex.match(r"[.,]\d", answer):
        before = r"(?<!\d)"
    return regex.search(f"{before}{regex.escape(answer)}{after}", text.casefold(), regex.V1) is not None


def _edge(at: str, word: str, number: str) -> str:
    """What must not stand beside an answer that begins, or ends, with this: nothing of its word, or of its number."""
    if not regex.match(_SPACED, at, regex.V1):
        return ""
    return word.format(_SPACED) + (number if at.isdigit() else "")


def read(path: str | Path) -> list[Example]:
    """Read `{"context": ..., "question": ..., "answer": ...}` a line; "answer" is one string, a list of strings that
    are all expected, or left out; "image" is a picture file or a list of them, beside the examples' own file, and then
    the context may be left out; "task" names a kind. Other fields and empty lines are ignored.

    Raises:
        FewerError: names the file, the line and what is wrong with it.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FewerError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise FewerError(f"{path} cannot be read: {error.strerror or error}") from error
    # Not splitlines(): JSON strings may hold the exotic line separators that it splits at.
    lines = content.split("\n")
    examples = [_example(f"{path}, line {i}", i, line, path.parent) for i, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise FewerError(f"{path} has no lines; one JSON object a line is needed, with context, question and answer")
    return examples


def gather(data: str | Path | Iterable[Mapping[str, Any] | Example]) -> list[Example]:
    """Examples out of a file, or of objects with the same fields."""
    if isinstance(data, (str, Path)):
        return read(data)
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise FewerError(f"tune(data={data!r}): give a JSONL file, or a list of objects with context, question, answer")
    found = []
    for number, one in enumerate(data, 1):
        where = f"data, example {number}"
        found.append(one if isinstance(one, Example) else _of(where, number, one, Path()))
    if not found:
        raise FewerError("data holds no examples")
    return found


def by_context(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples that share a context, or a picture, together, in the order in which they first come: two that share
    nothing may be tied by a third that shares something with each."""
    tied: dict[str, str] = {}

    def end(share: str) -> str:
        while (next_ := tied.get(share, share)) != share:
            share = next_
        return share

    for example in examples:
        first, *more = map(end, example.stands_on)
        for other in more:
            tied[end(other)] = end(first)
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(end(example.stands_on[0]), []).append(example)
    return list(groups.values())


def parts(examples: Sequence[Example], needed: int, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
    """Examples to search with, to calibrate with, and to check with afterwards: contexts are drawn at random, with all
    their examples; none is in two parts, and examples that are the same count once.

    A quarter searches, a tenth checks, the rest, and at least `needed` contexts, calibrates.

    Raises:
        FewerError: there are too few, which no setting could pass with.
    """
    different: dict[str, Example] = {}
    for example in examples:
        if set(different.setdefault(example.key, example).answers) != set(example.answers):
            raise FewerError(
                f"the examples in lines {different[example.key].line} and {example.line} ask the same and expect "
                f"different answers ({', '.join(different[example.key].answers)!r}, {', '.join(example.answers)!r}): "
                "leave one out, or expect both in one example"
            )
    groups = by_context(list(different.values()))
    order = random.Random(f"parts/{seed}").sample(groups, len(groups))
    least = needed + 2
    if len(order) < least:
        more = f" with {len(order)} different contexts" if len(order) < len(examples) else ""
        raise FewerError(
            f"{len(examples)} examples{more} are too few: even if nothing is lost, this loss at this confidence takes "
            f"{needed} to calibrate with, and some more to search with; give at least {least}, better "
            f"{-(-needed * 10 // 6)}, with contexts of their own, or ask for a greater loss or less confidence"
        )
    searching = max(1, min(len(order) // 4, len(order) - needed - 1))
    checking = max(1, min(len(order) // 10, len(order) - needed - searching))
    cuts = order[:searching], order[searching : len(order) - checking], order[len(order) - checking :]
    search, calibrate, check = ([example for group in part for example in group] for part in cuts)
    return search, calibrate, check


def _example(where: str, number: int, line: str, folder: Path) -> Example:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise FewerError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets within brackets
        raise FewerError(f"{where} is not JSON that can be read: {error}") from None
    return _of(where, number, fields, folder)


def _of(where: str, number: int, fields: Any, folder: Path) -> Example:
    if not isinstance(fields, Mapping):
        raise FewerError(f"{where} holds {_kind(fields)}, not a JSON object")
    images = _strings(where, "image", fields.get("image", fields.get("images", [])))
    expected = ["question"] if images else ["context", "question"]
    if missing := [name for name in expected if name not in fields]:
        raise FewerError(f"{where} lacks {', '.join(missing)}")
    for name in ("context", "question", "task"):
        if not isinstance(fields.get(name, ""), str):
            raise FewerError(f"{where}: {name} is {_kind(fields[name])}, not a string")
        _text(where, name, fields.get(name, ""))
    if not images and not fields["context"].strip():
        raise FewerError(f"{where}: context is empty")
    answers = _strings(where, "answer", fields["answer"]) if "answer" in fields else ()
    # An empty answer would be found in every prediction.
    if "answer" in fields and not (answers and all(one.strip() for one in answers)):
        raise FewerError(f"{where}: answer is empty")
    found = tuple(str(folder / name) for name in images)
    return Example(fields.get("context", ""), fields["question"], answers, found, fields.get("task", ""), number)


def _seen(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, ValueError):  # who asks says so
        return path


def _strings(where: str, name: str, value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, (list, tuple)) else [value]
    for one in listed:
        if not isinstance(one, str):
            raise FewerError(f"{where}: {name} is {_kind(value)}, not a string or a list of strings")
        _text(where, name, one)
    return tuple(listed)


def _text(where: str, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FewerError(f"{where}: {name} holds half a surrogate pair, which is no text") from None


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
