"""What compressing a prompt gives: the shorter text, where each piece of it came from, and a way back."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import regex

from fewer.prompts.settle import Kept, Run, text_of
from fewer.prompts.source import Source, Span
from fewer.types import FewerError

_ANSWER = regex.compile(r"[\w\p{M}]+")


class Unit(NamedTuple):
    """A unit of text: where it was, whether it stayed, what the method said of it, the rule that protected it."""

    document: int
    start: int
    end: int
    kept: bool
    score: float
    rule: str


class Found(NamedTuple):
    """Words of an answer that stand in the compressed text: where in the answer, and where they came from.

    `source` reaches from the first word to the last in the source, with what was dropped between them.
    """

    start: int
    end: int
    source: Span
    text: str


@dataclass(frozen=True, eq=False)
class Compression:
    """A shortened prompt.

    `text` is what to send: pieces of the documents, in order, joined by `glue` where one document follows another.
    Tokens are `tokenizer`'s, `limit` is how many were allowed (None where the method decided by its own threshold).

    >>> import fewer
    >>> done = fewer.compress_prompt("one two three four", "random", tokens=9, tokenizer="characters")
    >>> done.tokens_after <= 9 and done.verify("one two three four")
    True
    >>> fewer.restore(done.text, done.patch())
    'one two three four'
    """

    text: str
    runs: tuple[Run, ...]
    source: Source
    method: str
    limit: int | None
    tokens_before: int
    tokens_after: int
    glue: str
    single: bool
    kept_units: Kept | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> str:
        """The tokenizer that tokens are counted in."""
        return self.source.counter.name

    @property
    def share(self) -> float:
        """Tokens after, of those before."""
        return self.tokens_after / max(self.tokens_before, 1)

    @property
    def extractive(self) -> bool:
        """Whether all of the text stands in the source; False where a method rewrote something."""
        return all(run.written is None for run in self.runs)

    @property
    def prompt(self) -> str:
        """Instruction, text and question, with blank lines between."""
        return "\n\n".join(part for part in (self.source.instruction, self.text, self.source.question) if part)

    @property
    def documents(self) -> tuple[str, ...]:
        """Each document's part of the text, "" where nothing of it stayed."""
        return tuple(
            text_of(self.source.documents, tuple(run for run in self.runs if run.document == i), "")
            for i in range(len(self.source.documents))
        )

    @cached_property
    def kept(self) -> tuple[Span, ...]:
        """What stands in the text, in the order of the source."""
        return tuple(sorted(Span(*run[:3]) for run in self.runs if run.written is None))

    @cached_property
    def dropped(self) -> tuple[Span, ...]:
        """What does not."""
        out = []
        for i, document in enumerate(self.source.documents):
            edges = [(0, 0), *((s.start, s.end) for s in self.kept if s.document == i), (len(document), len(document))]
            out += [Span(i, left[1], right[0]) for left, right in pairwise(edges) if left[1] < right[0]]
        return tuple(out)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Every unit that the method ranked, in the order of the source; none where everything stays."""
        if self.kept_units is None:
            return ()
        ranking, mask, rules = self.kept_units.ranking, self.kept_units.mask, self.kept_units.rules
        rows = zip(ranking.units, mask.tolist(), ranking.value.tolist(), rules, strict=True)
        return tuple(Unit(*span, kept, value, rule) for span, kept, value, rule in rows)

    def verify(self, source: str | Sequence[str]) -> bool:
        """Whether the text follows from these documents and the spans, character for character."""
        documents = (source,) if isinstance(source, str) else tuple(source) if isinstance(source, Iterable) else (None,)
        for text in documents:
            if not isinstance(text, str):
                raise FewerError(f"verify(): the source holds {type(text).__name__}, not text; give what was shortened")
        fits = all(run.document < len(documents) and run.end <= len(documents[run.document]) for run in self.runs)
        return (
            fits
            and len(documents) == len(self.source.documents)
            and (text_of(documents, self.runs, self.glue) == self.text)
        )

    def patch(self) -> str:
        """What `fewer.restore` needs beside the text to give the source back: JSON that stands for itself."""
        layout = []
        for document in dict.fromkeys([*(run.document for run in self.runs), *range(len(self.source.documents))]):
            whole, at, steps = self.source.documents[document], 0, []
            for run in (run for run in self.runs if run.document == document):
                if at < run.start:
                    steps.append([0, whole[at : run.start]])
                if run.written is None:
                    steps.append([run.end - run.start])
                else:
                    steps.append([len(run.written), whole[run.start : run.end]])
                at = run.end
            if at < len(whole):
                steps.append([0, whole[at:]])
            layout.append({"document": document, "steps": steps})
        body = {
            "format": "fewer-patch", "version": 1, "single": self.single, "glue": self.glue, "layout": layout,
            "text": _sha(self.text), "source": _sha(json.dumps(self.source.documents)),
        }  # fmt: skip
        return _json({**body, "sha256": _sha(_json(body))})

    def locate(self, answer: str) -> tuple[Found, ...]:
        """Where words of an answer came from: its longest runs of words that stand in the text, left to right.

        Case is ignored. A run that is found more than once is traced to its first place.
        """
        if not isinstance(answer, str):
            raise FewerError(f"locate(): the answer is {type(answer).__name__}, not text")
        said = [(m.group().casefold(), *m.span()) for m in _ANSWER.finditer(answer)]
        here = self._words()
        known = {word: i for i, word in enumerate(dict.fromkeys(word for word, _, _ in here if word))}
        words = np.array([*(known.get(word, -1) for word, _, _ in here), -1], dtype=np.int64)  # no answer holds -1
        asked = [known.get(word, -2) for word, _, _ in said]
        out: list[Found] = []
        i = 0
        while i < len(said):
            best, length = np.flatnonzero(words == asked[i]), 0  # where the run that starts here stands
            while len(more := best[words[best + length] == asked[i + length]]):
                best, length = more, length + 1
                if i + length == len(said):
                    break
            if length:
                first, last = int(best[0]), int(best[0]) + length - 1
                out += self._traced(said[i][1], said[i + length - 1][2], here[first][1], here[last][2])
            i += max(length, 1)
        return tuple(out)

    def _words(self) -> list[tuple[str, int, int]]:
        """The text's words, with an empty one where another document begins, which no run of words crosses."""
        found = [(m.group().casefold(), *m.span()) for m in _ANSWER.finditer(self.text)]
        run = np.searchsorted(self._begins, [start for _, start, _ in found], side="right") - 1
        documents = np.array([run.document for run in self.runs], dtype=np.int64)[run]
        for i in (np.flatnonzero(np.diff(documents)) + 1).tolist()[::-1]:
            found.insert(i, ("", 0, 0))
        return found

    def _traced(self, start: int, end: int, left: int, right: int) -> list[Found]:
        """Characters `left` to `right` of the text, traced to the source; nothing if they were written anew."""
        first, last = self._at(left), self._at(right - 1)
        if first is None or last is None or first[0] != last[0] or first[1] > last[1]:
            return []
        span = Span(first[0], first[1], last[1] + 1)
        return [Found(start, end, span, self.source.of(span))]

    def _at(self, offset: int) -> tuple[int, int] | None:
        """The document and place of one character of the text."""
        index = int(np.searchsorted(self._begins, offset, side="right")) - 1
        run, inside = self.runs[index], offset - int(self._begins[index])
        return None if run.written is not None or inside >= run.end - run.start else (run.document, run.start + inside)

    @cached_property
    def _begins(self) -> Any:
        """Where in the text each run begins."""
        at, begins, last = 0, [], None
        for run in self.runs:
            length = run.end - run.start if run.written is None else len(run.written)
            at += len(self.glue) if last is not None and run.document != last and length else 0
            begins.append(at)
            at += length
            last = run.document if length else last
        return np.array(begins, dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the documents, as plain data."""
        return {
            "text": self.text, "method": self.method, "tokenizer": self.tokenizer, "limit": self.limit,
            "tokens_before": self.tokens_before, "tokens_after": self.tokens_after, "extractive": self.extractive,
            "kept": [list(span) for span in self.kept], "dropped": [list(span) for span in self.dropped],
            "protected": [[*list(unit[:3]), unit.rule] for unit in self.units if unit.rule],
            "seconds": self.seconds, "notes": list(self.notes),
        }  # fmt: skip

    def __str__(self) -> str:
        asked = "by the method's own threshold" if self.limit is None else f"{self.limit:,} allowed"
        lines = [
            f"{self.method}: {self.tokens_before:,} tokens to {self.tokens_after:,} ({self.share:.1%}), {asked}; "
            f"counted by {self.tokenizer}; {self.seconds:.2f} s"
        ]
        saved: dict[str, int] = {}
        for unit in self.units:
            if unit.rule:
                saved[unit.rule] = saved.get(unit.rule, 0) + 1
        lines += [f"protected: {', '.join(f'{n} by {rule}' for rule, n in saved.items())}"] if saved else []
        return "\n".join([*lines, *self.notes])


def restore(text: str, patch: str) -> str | list[str]:
    """The source of a compressed text, byte for byte: a string, or the list of documents if a list was given.

    Args:
        text: `Compression.text`, unchanged.
        patch: `Compression.patch()`, unchanged.

    Raises:
        FewerError: the patch is none of fewer's, or it or the text is not what it was.
    """
    if not isinstance(text, str) or not isinstance(patch, str):
        raise FewerError(f"restore(): text and patch are strings, not {type(text).__name__}, {type(patch).__name__}")
    try:
        read = json.loads(patch)
        known, version = read["format"] == "fewer-patch", read["version"]
        whole = _json(read) == patch  # what JSON does not mind is a change too
        digest = read.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FewerError("restore(): the patch is none that fewer made, or it was cut short") from None
    if not known or not whole or _sha(_json(read)) != digest:
        raise FewerError("restore(): the patch was changed since it was made; nothing is restored from it")
    if version != 1:
        raise FewerError(f"restore(): the patch is of version {version}; this fewer reads 1 only")
    if not all(name in read for name in ("text", "source", "single", "layout", "glue")):
        raise FewerError("restore(): the patch lacks parts that every patch of fewer has")
    if _sha(text) != read["text"]:
        raise FewerError(
            "restore(): the patch belongs to another text, or the text was changed; give both as they were"
        )
    try:
        documents = _replayed(text, read)
    except (KeyError, TypeError, ValueError, IndexError):
        documents = []
    if _sha(json.dumps(documents)) != read["source"]:
        raise FewerError("restore(): what the patch gives is not the source it was made of")
    return documents[0] if read["single"] is True and len(documents) == 1 else documents


def _replayed(text: str, read: dict[str, Any]) -> list[str]:
    """The documents, from the text and what was taken from between its pieces."""
    documents, at, begun = [""] * len(read["layout"]), 0, False
    for part in read["layout"]:
        pieces = []
        if begun and any(step[0] for step in part["steps"]):
            at += len(read["glue"])
        for length, *gone in part["steps"]:
            if not 0 <= length <= len(text) - at:  # else a small patch could ask for a text without end
                raise ValueError("a step outside the text")
            pieces.append(gone[0] if gone else text[at : at + length])
            at += length
            begun = begun or length > 0
        documents[part["document"]] = "".join(pieces)
    return documents


def _json(body: Any) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
