"""Where a text may be cut: its graphemes, what readers see as one character, and its white space, as offsets."""

from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_JOINING = regex.compile(
    r"[\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}\p{GCB=Prepend}\p{GCB=Regional_Indicator}"
    r"\p{GCB=L}\p{GCB=V}\p{GCB=T}]+"
)
"""Characters that can make one grapheme with a neighbour; between two others there is always an edge."""

_GRAPHEME = regex.compile(r"\X")
_FLAGS = regex.compile(r"\p{GCB=Regional_Indicator}{2,}")
_SPACES = np.array([chr(code).isspace() for code in range(0x3001)] + [False])
"""By code; there is no white space beyond U+3000."""


@dataclass(frozen=True, eq=False)
class Shape:
    """Graphemes of more than one character, `starts` to `ends`, and stretches of white space, `left` to `right`, with
    the number of line `breaks` in each. A grapheme is white space if all of it is."""

    starts: Ints
    ends: Ints
    left: Ints
    right: Ints
    breaks: Ints

    @classmethod
    def of(cls, text: str) -> "Shape":
        plain = text.isascii()
        codes = (
            np.frombuffer(text.encode("ascii"), dtype=np.uint8)
            if plain
            else np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        )
        returns, lines = np.flatnonzero(codes == 13), np.flatnonzero(codes == 10)
        pairs = returns[np.isin(returns + 1, lines, assume_unique=True)] if len(returns) else returns
        joined = np.zeros((0, 2), dtype=np.int64) if plain else _joined(text)
        blank = _SPACES[codes] if plain else _SPACES[np.minimum(codes, 0x3001)]
        if len(joined):  # a space with an accent on it is not white
            mark = np.zeros(len(text) + 1, dtype=np.int8)
            np.add.at(mark, joined[:, 0], 1)
            np.add.at(mark, joined[:, 1], -1)
            blank = blank & (np.cumsum(mark, dtype=np.int8)[:-1] == 0)
        edges = np.flatnonzero(np.diff(blank, prepend=False, append=False))
        left, right = edges[::2], edges[1::2]
        starts, ends = np.concatenate([joined[:, 0], pairs]), np.concatenate([joined[:, 1], pairs + 2])
        order = np.argsort(starts) if len(pairs) and len(joined) else slice(None)
        breaks = np.searchsorted(lines, right) - np.searchsorted(lines, left)
        return cls(starts[order], ends[order], left, right, breaks)

    def floor(self, at: Ints) -> Ints:
        """Offsets inside a grapheme moved to its start."""
        return self._moved(at, self.starts)

    def ceil(self, at: Ints) -> Ints:
        """Offsets inside a grapheme moved to its end."""
        return self._moved(at, self.ends)

    def _moved(self, at: Ints, to: Ints) -> Ints:
        if not len(self.starts):
            return at
        index = np.searchsorted(self.starts, at) - 1
        inside = (index >= 0) & (at < self.ends[index])
        return np.where(inside, to[index], at)

    def strip(self, start: Ints, end: Ints) -> tuple[Ints, Ints]:
        """Spans without the white space at their ends; of one that is nothing else, `end <= start`."""
        if not len(self.left):
            return start, end
        first = np.searchsorted(self.left, start, side="right") - 1
        last = np.searchsorted(self.left, end) - 1
        return (
            np.where((first >= 0) & (start < self.right[first]), self.right[first], start),
            np.where((last >= 0) & (end <= self.right[last]), self.left[last], end),
        )


def paired(text: str) -> str:
    """The text with a sign and an accent for each two letters of flags, which make the same graphemes: runs of flags
    take `regex` time that grows with their square."""
    return str(_FLAGS.sub(lambda run: ("§\u0301" * len(run[0]))[: len(run[0])], text))


def _joined(text: str) -> Ints:
    """Graphemes of more than one character, `(n, 2)`, but for line ends: looked for around joining characters only."""
    text = paired(text)
    found: list[tuple[int, int]] = []
    begin = end = 0
    windows: list[tuple[int, int]] = []
    for match in _JOINING.finditer(text):
        first, last = match.span()
        if windows and first - 1 <= end:
            windows[-1] = (begin, last + 1)
        else:
            begin = max(first - 1, 0)
            windows.append((begin, last + 1))
        end = last + 1
    for begin, end in windows:
        for match in _GRAPHEME.finditer(text, begin, min(end, len(text))):
            left, right = match.span()
            if right - left > 1 and text[left] != "\r":
                found.append((left, right))
    return np.array(found, dtype=np.int64).reshape(-1, 2)
