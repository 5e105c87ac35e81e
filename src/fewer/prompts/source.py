"""What a prompt method reads, and what it says: documents cut into units, and a value for each unit.

    Source  ->  Ranking  ->  Kept  ->  Compression
    documents   what each unit   who stays   the text, and where
                is worth                     each piece came from

Offsets into the documents are the currency: characters, as Python counts them. A unit never cuts a grapheme (what a
reader sees as one character) and has no white space at its ends; white space between units belongs to none.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import regex
import sentencex
from numpy.typing import NDArray

from fewer.prompts.counting import Counter
from fewer.prompts.shape import Shape, paired
from fewer.types import Budget

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Span(NamedTuple):
    """Characters `start` to `end` of a document."""

    document: int
    start: int
    end: int


class Protected(NamedTuple):
    """A span that must stay, and the rule that says so."""

    document: int
    start: int
    end: int
    rule: str


# Scripts that put no spaces between words: each grapheme is a unit.
DENSE = r"\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_INNER = rf"[[\w\p{{M}}]--[{DENSE}]]"
_WORD = regex.compile(rf"{_INNER}+(?:(?:://|[./:\-_@#%+~\\'’?=&]){_INNER}+)*+|(?=\S)\X", regex.V1)
_ASCII_WORD = re.compile(r"\w+(?:(?:://|[./:\-_@#%+~\\'?=&])\w+)*|\S", re.ASCII)  # the same, three times as fast
_LINE = re.compile(r"[^\r\n]+")
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
"""White space outside ASCII, on which sentencex 1.0.32 panics behind a single capital letter."""
_BLANK = regex.compile(r"\n[^\S\n]*\n")

WINDOW = 8192
"""Characters of a line that are looked at together for sentences: some lines take time that grows with the square."""


@dataclass(frozen=True, eq=False)
class Units:
    """Pieces of documents that are kept or dropped whole, each an index into three arrays `(n,)`.

    They come in order, do not overlap, and have no white space at their ends.
    """

    document: Ints
    start: Ints
    end: Ints

    def __len__(self) -> int:
        return len(self.start)

    def __iter__(self) -> Iterator[Span]:
        return map(Span, self.document.tolist(), self.start.tolist(), self.end.tolist())

    def of(self, document: int) -> slice:
        """The units of one document."""
        return slice(*np.searchsorted(self.document, [document, document + 1]).tolist())

    @classmethod
    def made(cls, spans: Sequence[tuple[int, int, int]]) -> "Units":
        """From `(document, start, end)`, in order."""
        columns = np.array(spans, dtype=np.int64).reshape(-1, 3)
        return cls(columns[:, 0], columns[:, 1], columns[:, 2])


@dataclass(frozen=True)
class Source:
    """The documents to shorten, and what a method may know beside them.

    `question` and `instruction` are never shortened and never part of the text; methods that are blind to them say so.
    `counter` counts tokens as the reader of the text will. `protected` stays, whatever a method says of it.
    """

    documents: tuple[str, ...]
    question: str = ""
    instruction: str = ""
    protected: tuple[Protected, ...] = ()
    counter: Counter = field(default_factory=lambda: Counter("characters", len))

    @cached_property
    def ends(self) -> tuple[Ints, ...]:
        """For each document, where each of the counter's tokens ends."""
        return tuple(self.counter.ends(text) for text in self.documents)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Each document's graphemes and white space."""
        return tuple(map(Shape.of, self.documents))

    @cached_property
    def words(self) -> Units:
        """Words; identifiers, paths, numbers and hyphenated words in one piece; punctuation mark by mark; each grapheme
        of scripts that put no spaces between words."""
        return self.cut(_words)

    @cached_property
    def sentences(self) -> Units:
        """Sentences; a line break ends one too."""
        return self.cut(_sentences)

    @cached_property
    def lines(self) -> Units:
        """Lines that are not blank."""
        return self.cut(lambda text: (m.span() for m in _LINE.finditer(text)))

    @cached_property
    def paragraphs(self) -> Units:
        """What blank lines part."""
        return self.cut(_paragraphs)

    @cached_property
    def whole(self) -> Units:
        """Every document that is not blank, as one unit."""
        return self.cut(lambda text: [(0, len(text))])

    def cut(self, spans: Callable[[str], Any]) -> Units:
        """Units from a function that gives `(start, end)` in each document's text, in order and without overlap. Ends
        are moved out of graphemes, white space at the ends is left out, and what is empty then is no unit."""
        return self._cut([spans(text) for text in self.documents])

    def tokens(self, offsets: Sequence[Any]) -> Units:
        """Units that are a model's tokens, given their offsets `(n, 2)` for each document; tokens that share a grapheme
        are one unit."""
        return self._cut(offsets)

    def _cut(self, spans: Sequence[Any]) -> Units:
        documents, starts, ends = [], [], []
        for document, (pairs, shape) in enumerate(zip(spans, self.shapes, strict=True)):
            start, end = _columns(pairs)
            end = shape.ceil(end)
            before = np.maximum.accumulate(np.concatenate([[0], end[:-1]])) if len(end) else end
            start, end = shape.strip(np.maximum(shape.floor(start), before), end)
            there = start < end
            starts.append(start[there])
            ends.append(end[there])
            documents.append(np.full(len(starts[-1]), document, dtype=np.int64))
        if not documents:
            return Units.made([])
        return Units(np.concatenate(documents), np.concatenate(starts), np.concatenate(ends))

    def sizes(self, units: Units) -> Floats:
        """About how many of the counter's tokens each unit takes: those that end in it or in the white space before."""
        out = np.zeros(len(units))
        for document in range(len(self.documents)):
            mine = units.of(document)
            after = np.searchsorted(np.sort(self.ends[document]), units.end[mine], side="right")
            out[mine] = np.diff(after, prepend=0)
        return out

    def of(self, span: tuple[int, int, int]) -> str:
        """The text of a span."""
        document, start, end = span
        return self.documents[document][start:end]

    def spread(self, units: Units, offsets: Sequence[Any], values: Sequence[Any], how: str = "mean") -> Floats:
        """A value for each unit from the tokens that touch it: their `mean`, `sum` or `max`, or the `first`'s; 0 where
        none does.

        Args:
            offsets: for each document, where its tokens are, `(n, 2)`.
            values: for each document, a number for each token, `(n,)`.
        """
        out = np.zeros(len(units))
        for document, (pairs, given) in enumerate(zip(offsets, values, strict=True)):
            mine = units.of(document)
            pairs, given = np.asarray(pairs, dtype=np.int64).reshape(-1, 2), np.asarray(given, dtype=np.float64)
            first = np.searchsorted(pairs[:, 1], units.start[mine], side="right")
            after = np.maximum(first, np.searchsorted(pairs[:, 0], units.end[mine], side="left"))
            if how == "max":
                padded = np.append(given, -np.inf)  # reduceat wants every index inside
                top = np.maximum.reduceat(padded, np.stack([first, after], 1).ravel())[::2] if len(first) else first
                out[mine] = np.where(after > first, top, 0.0)
                continue
            if how == "first":
                out[mine] = np.where(after > first, np.append(given, 0.0)[first], 0.0)
                continue
            total = np.concatenate([[0.0], np.cumsum(given)])
            summed = total[after] - total[first]
            out[mine] = summed if how == "sum" else summed / np.maximum(after - first, 1)
        return out


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a method says of a source.

    `value` says for each unit how much it is worth keeping, higher = stays longer. `chosen`, where a method decides by
    itself at this budget, says which it would keep: they come before all others when the budget is met. `order` is the
    order in which documents are put out. `written` is text to put in the place of a unit, from methods that rewrite; a
    unit that holds protected text is not replaced. `needs` `(m, 2)` are pairs of units: the first of each stays only
    where the second does, as a statement with the function that it is in; see `fewer.prompts.needs`.
    """

    units: Units
    value: Floats
    chosen: Bools | None = None
    order: tuple[int, ...] | None = None
    written: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    needs: Ints | None = None


@runtime_checkable
class PromptMethod(Protocol):
    """What a prompt method is: one function, nothing to inherit. A registered one also has a `card`."""

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        """What each unit of the source is worth. The budget counts tokens, `source.counter`'s; None lets the method
        decide by its own threshold, which `Ranking.chosen` then gives."""
        ...


def graphemes(text: str) -> Callable[[int], int]:
    """A function that moves an offset inside a grapheme to its end, and leaves others."""
    shape = Shape.of(text)
    starts, ends = shape.starts.tolist(), shape.ends.tolist()

    def edge(at: int) -> int:
        index = bisect_left(starts, at) - 1
        return ends[index] if index >= 0 and at < ends[index] else at

    return edge


def _columns(pairs: Any) -> tuple[Ints, Ints]:
    """Starts and ends, from an array `(n, 2)` or any iterable of pairs."""
    if not isinstance(pairs, np.ndarray):
        pairs = np.fromiter(chain.from_iterable(pairs), dtype=np.int64)
    columns = pairs.astype(np.int64, copy=False).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _words(text: str) -> Iterator[tuple[int, int]]:
    found = _ASCII_WORD.finditer(text) if text.isascii() else _WORD.finditer(paired(text))
    return (match.span() for match in found)


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    for line in _LINE.finditer(text):
        at, end = line.span()
        while at < end:
            stop = end if end - at <= WINDOW else text.rfind(" ", at, at + WINDOW)
            stop = stop if stop > at else at + WINDOW
            found = list(_segmented(text, at, stop))
            if stop < end and len(found) > 1:
                found.pop()  # the window may cut it: it is read again in the next one
            yield from found
            at = found[-1][1] if stop < end and found else stop


def _segmented(text: str, at: int, end: int) -> Iterator[tuple[int, int]]:
    plain, shift = _WIDE_SPACE.sub(" ", text[at:end]), at
    for sentence in _split(plain):
        said = sentence.strip()
        found = plain.find(said, at - shift) + shift  # the segmenter may lose white space between
        if found >= shift and said:
            if text[at:found].strip():  # nor may it lose anything else
                yield at, found
            at = found + len(said)
            yield found, at
    if text[at:end].strip():
        yield at, end


def _split(line: str) -> list[str]:
    """Sentences as sentencex has them; none where it panics, which is no Exception: then the line is one."""
    try:
        return list(sentencex.segment("en", line))
    except BaseException as why:
        if type(why).__name__ != "PanicException":
            raise
        return []


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    at = 0
    for blank in _BLANK.finditer(text):
        yield at, blank.start()
        at = blank.end()
    yield at, len(text)
