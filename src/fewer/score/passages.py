"""Units of a text taken together, as many as a model reads at once."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from fewer.prompts.source import Ints, Source, Span, Units
from fewer.types import FewerError


def question_of(source: Source, method: str) -> str:
    """The question, for methods that can do nothing without one."""
    if not source.question.strip():
        raise FewerError(f"{method} ranks by a question, and none was given: say question='...'")
    return source.question


def passages(units: Units, sizes: Sequence[int], room: int, across: bool = False) -> list[range]:
    """Runs of consecutive units whose sizes add up to at most `room`; a unit that is larger stands alone.

    Args:
        sizes: of each unit, in the model's tokens.
        across: whether a run may go on in the next document.

    >>> passages(Units.made([(0, 0, 2), (0, 3, 5), (0, 6, 8), (1, 0, 4)]), [4, 4, 9, 1], room=8)
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    out: list[range] = []
    first, filled = 0, 0
    documents = units.document.tolist()
    for index, size in enumerate(sizes):
        apart = index > first and not across and documents[index] != documents[first]
        if index > first and (apart or filled + size > room):
            out.append(range(first, index))
            first, filled = index, 0
        filled += size
    return [*out, range(first, len(units))] if len(units) else out


def together(source: Source, spans: Sequence[Span]) -> str:
    """The text of neighbouring units with what is between them; another document begins on a new line.

    >>> together(Source(("One. Two. Three.", "Four.")), [Span(0, 5, 9), Span(0, 10, 16), Span(1, 0, 5)])
    'Two. Three.\\nFour.'
    """
    out = []
    for document, group in groupby(spans, key=lambda span: span.document):
        mine = list(group)
        out.append(source.of((document, mine[0].start, mine[-1].end)))
    return "\n".join(out)


def holders(units: Units, larger: Units) -> Ints:
    """For each unit, which of the larger ones it begins in, or, between two, the one before."""
    out = np.zeros(len(units), dtype=np.int64)
    for document in np.unique(units.document).tolist():
        mine, theirs = units.of(document), larger.of(document)
        at = np.searchsorted(larger.start[theirs], units.start[mine], side="right") - 1
        out[mine] = theirs.start + np.maximum(at, 0)
    return out
