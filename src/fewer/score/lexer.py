"""Identifiers of source code, and which tokens of a text belong to one.

python    names as Python's own tokenizer finds them: not in strings or comments (in f-strings from Python 3.12 on)
other     runs of letters, digits and underscores that start with no digit, wherever they stand
"""

import io
import re
import tokenize
from collections.abc import Sequence

from fewer.types import FewerError, UnknownName

WORD = re.compile(r"\b[^\W\d]\w*")
LANGUAGES = ("python", "other")


def identifiers(code: str, language: str = "python") -> list[tuple[int, int]]:
    """Where identifiers, keywords among them, start and end, in characters.

    >>> identifiers("get_value = 'x y'  # why")
    [(0, 9)]
    >>> identifiers("get_value = 'x y';", "other")
    [(0, 9), (13, 14), (15, 16)]
    """
    if language == "other":
        return [found.span() for found in WORD.finditer(code)]
    if language != "python":
        raise UnknownName(f"language={language!r}: known are {', '.join(LANGUAGES)}")
    starts = [0]
    for line in io.StringIO(code, newline=""):
        starts.append(starts[-1] + len(line))
    try:
        return [
            (starts[one.start[0] - 1] + one.start[1], starts[one.end[0] - 1] + one.end[1])
            for one in tokenize.generate_tokens(io.StringIO(code, newline="").readline)
            if one.type == tokenize.NAME
        ]
    except (tokenize.TokenError, SyntaxError) as found:  # IndentationError is a SyntaxError
        raise FewerError(
            f"this is no whole Python ({found}): give whole statements, or language='other', which takes names for "
            "what is spelled like one"
        ) from found


def groups(code: str, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each token, by its first character and the one after its last, the number of the span it lies in, or -1.

    White space that a token starts with does not count. A token that reaches beyond a span is in none.

    >>> groups("a.get_it", [(0, 1), (1, 5), (5, 6), (6, 8)], [(0, 1), (2, 8)])  # ".get" is more than a name
    [0, -1, 1, 1]
    """
    found, at = [], 0
    for start, end in offsets:
        while start < end and code[start].isspace():
            start += 1
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        inside = start < end and at < len(spans) and spans[at][0] <= start and end <= spans[at][1]
        found.append(at if inside else -1)
    return found
