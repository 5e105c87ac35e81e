"""What a prompt method reads, and what it says: documents cut into units, and a value for each unit.

    Source  ->  Ranking  ->  Kept  ->  Compression
    documents   what each unit   who stays   the text, and where
                is worth                     each piece came from

Offsets into the documents are the currency: characters, as Python counts them. A unit never cuts a grapheme (what a
reader sees as one character) and has no white space at its ends; white space between units belongs to none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import regex
import sentencex
from numpy.typing import NDArray

from fewer.prompts.counting import Counter
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
_DENSE = r"[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_INNER = rf"(?:(?!{_DENSE})[\w\p{{M}}])"
_WORD = regex.compile(rf"(?={_DENSE})\X|{_INNER}+(?:(?:://|[./:\-_@#%+~\\'’?=&]){_INNER}+)*|(?=\S)\X")
_LINE = regex.compile(r"[^\r\n]*\S[^\r\n]*")
_BLANK = regex.compile(r"\n[^\S\n]*\n")


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
    def words(self) -> Units:
        """Words; identifiers, paths, numbers and hyphenated words in one piece; punctuation mark by mark; each grapheme
        of scripts that put no spaces between words."""
        return self.cut(lambda text: (m.span() for m in _WORD.finditer(text)))

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
        found = []
        for document, text in enumerate(self.documents):
            edges = graphemes(text)
            last = 0
            for start, end in spans(text):
                start, end = max(last, edges(start)), edges(end)
                piece = text[start:end]
                start, end = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
                if start < end:
                    found.append((document, start, end))
                    last = end
        return Units.made(found)

    def tokens(self, offsets: Sequence[Any]) -> Units:
        """Units that are a model's tokens, given their offsets `(n, 2)` for each document; tokens that share a grapheme
        are one unit."""
        return Units.made([span for i, pairs in enumerate(offsets) for span in self._tokens(i, pairs)])

    def _tokens(self, document: int, pairs: Any) -> list[tuple[int, int, int]]:
        one = Source((self.documents[document],))
        return [(document, span.start, span.end) for span in one.cut(lambda _: ((int(a), int(b)) for a, b in pairs))]

    def of(self, span: tuple[int, int, int]) -> str:
        """The text of a span."""
        document, start, end = span
        return self.documents[document][start:end]

    def spread(self, units: Units, offsets: Sequence[Any], values: Sequence[Any], how: str = "mean") -> Floats:
        """A value for each unit from the tokens that touch it: their `mean`, `sum` or `max`; 0 where none does.

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
            total = np.concatenate([[0.0], np.cumsum(given)])
            summed = total[after] - total[first]
            out[mine] = summed if how == "sum" else summed / np.maximum(after - first, 1)
        return out


@dataclass(frozen=True, eq=False)
class Ranking:
    """What a method says of a source.

    `value` says for each unit how much it is worth keeping, higher = stays longer. `chosen`, where a method decides by
    itself at this budget, says which it would keep: they come before all others when the budget is met. `order` is the
    order in which documents are put out. `written` is text to put in the place of a unit, from methods that rewrite.
    """

    units: Units
    value: Floats
    chosen: Bools | None = None
    order: tuple[int, ...] | None = None
    written: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class PromptMethod(Protocol):
    """What a prompt method is: one function, nothing to inherit. A registered one also has a `card`."""

    def rank(self, source: Source, budget: Budget | None) -> Ranking:
        """What each unit of the source is worth. The budget counts tokens, `source.counter`'s; None lets the method
        decide by its own threshold, which `Ranking.chosen` then gives."""
        ...


def graphemes(text: str) -> Callable[[int], int]:
    """A function that moves an offset inside a grapheme to its end, and leaves others."""
    if text.isascii():
        return (lambda at: at) if "\r\n" not in text else (lambda at: at + (text[at - 1 : at + 1] == "\r\n"))
    within = bytearray(len(text) + 1)  # 1 where an offset is inside a grapheme
    for match in regex.finditer(r"\X", text):
        start, end = match.span()
        if end - start > 1:
            within[start + 1 : end] = b"\x01" * (end - start - 1)
    return lambda at: at if not within[at] else within.index(0, at)


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    for line in _LINE.finditer(text):
        at, end = line.span()
        for sentence in sentencex.segment("en", line.group()):
            found = text.find(sentence.strip(), at, end)  # the segmenter may lose white space between
            if found >= 0 and sentence.strip():
                if text[at:found].strip():  # nor may it lose anything else
                    yield at, found
                at = found + len(sentence.strip())
                yield found, at
        if text[at:end].strip():
            yield at, end


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    at = 0
    for blank in _BLANK.finditer(text):
        yield at, blank.start()
        at = blank.end()
    yield at, len(text)
