"""Which units stay, so that the text has no more tokens than were asked for: counted on the text itself.

Protected text stays whatever it is worth. The others follow by what the method says they are worth, and where the cut
falls is found by counting the tokens of the text that it gives: an estimate from the tokens of the source says where
to look first, and what is left over is filled with units that still fit. A unit that needs others (`Ranking.needs`)
comes with them and never without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import regex

from fewer.prompts.guarded import guarded
from fewer.prompts.needs import closed, pulling, steps
from fewer.prompts.shape import Shape
from fewer.prompts.source import DENSE, Bools, Floats, Ints, Ranking, Source
from fewer.types import BudgetError, FewerError

NEAR = 1 / 500
"""How near the ceiling is near enough, as a share of it: on long texts each token nearer costs another count."""

FILL, SHORT = 16, 2000
"""Units that are tried at the end, one by one, where the ceiling is no more than so many tokens."""

_BREAK = regex.compile(r"[^\S\n]*\n")
_MARK = regex.compile(r"[^\w\p{M}]|_")
_RUNNING = regex.compile(rf"[[\w\p{{M}}]--[_{DENSE}]]", regex.V1)


class Run(NamedTuple):
    """Characters of a document that stand in the text as they are, or `written` in their place."""

    document: int
    start: int
    end: int
    written: str | None = None


@dataclass(frozen=True, eq=False)
class Kept:
    """Which units stay: their `mask`, the `rule` that protected each ("" for none), and the text in `runs`."""

    ranking: Ranking
    mask: Bools
    rules: list[str]
    runs: tuple[Run, ...]
    tokens: int


def settle(source: Source, ranking: Ranking, limit: int | None, glue: str) -> Kept:
    """Keep the units that are worth most within `limit` tokens of `source.counter`; None keeps what the method chose.

    Raises:
        BudgetError: what is protected takes more than that.
    """
    for document, shape in enumerate(source.shapes):
        mine = ranking.units.of(document)
        for edges in (ranking.units.start[mine], ranking.units.end[mine]):
            if (shape.floor(edges) != edges).any():
                raise FewerError(
                    f"a unit of document {document} ends inside a grapheme; Source.cut makes units that do not"
                )
    ranking, rules = guarded(source, ranking)
    forced = np.array([bool(rule) for rule in rules], dtype=bool)
    chosen = np.zeros(len(rules), dtype=bool) if ranking.chosen is None else ranking.chosen
    pull = pulling(ranking.needs, len(rules))
    if ranking.needs is not None:
        forced, chosen = closed(forced, pull), closed(chosen, pull)
    ranked = np.lexsort((np.arange(len(rules)), -ranking.value, ~chosen, ~forced))
    order, cuts = steps(ranked, ranking.needs)

    def of(count: int, more: Sequence[int] = ()) -> tuple[Bools, _Laid, int]:
        mask = np.zeros(len(rules), dtype=bool)
        mask[order[:count]] = True
        mask[list(more)] = True
        laid = _laid(source, ranking, mask)
        return mask, laid, source.counter.count(_text(source.documents, laid, ranking, glue))

    if limit is None:
        mask, laid, tokens = of(int((forced | chosen).sum()))
        return Kept(ranking, mask, rules, _runs(laid, ranking), tokens)
    best = of(int(forced.sum()))
    if best[2] > limit:
        raise BudgetError(
            f"what is protected takes {best[2]} tokens of {source.counter.name} and {limit} may stay; "
            f"allow at least {best[2]}, or protect less"
        )
    low, high = int(np.searchsorted(cuts, forced.sum())), len(cuts)  # what is before cut `low` fits; before `high` not
    each = _weights(source, ranking)
    weights = np.concatenate([[0.0], np.cumsum(each[order])])[cuts]
    at, slope = (weights[low], best[2]), 1.0  # what was tried last, and what the weights say for each token counted
    if limit > SHORT:  # what is scattered is counted otherwise: an eighth of the text tells how
        some = np.zeros(len(rules), dtype=bool)
        some[order[: cuts[np.searchsorted(weights, limit, side="right") - 1]]] = True
        some[: len(some) * 7 // 16] = some[len(some) * 9 // 16 :] = False
        counted = source.counter.count(_text(source.documents, _laid(source, ranking, some), ranking, glue))
        slope = float(np.clip(each[some].sum() / max(counted, 1), 0.25, 4.0)) if counted else 1.0
    for turn in range(64):
        if high - low <= 1 or limit - best[2] <= NEAR * limit:
            break
        goal = at[0] + (limit * (1 - NEAR / 2) - at[1]) * slope  # the middle of what is near enough
        guess = int(np.searchsorted(weights, goal, side="right")) - 1 if turn < 8 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        tried = of(int(cuts[guess]))
        if tried[2] != at[1]:
            slope = float(np.clip((weights[guess] - at[0]) / (tried[2] - at[1]), 0.25, 4.0))
        at = (weights[guess], tried[2])
        if tried[2] <= limit:
            low, best = guess, tried
        else:
            high = guess
    added: list[int] = []
    for unit in ranked[~best[0][ranked]][:FILL].tolist() if limit <= SHORT else ():
        if best[2] >= limit:
            break
        if best[0][unit]:  # another one needed it
            continue
        more = [*added, *pull(unit, best[0])]
        tried = of(int(cuts[low]), more)
        if tried[2] <= limit:
            best, added = tried, more
    return Kept(ranking, best[0], rules, _runs(best[1], ranking), best[2])


def _weights(source: Source, ranking: Ranking) -> Floats:
    """About how many tokens each unit adds."""
    weights = source.sizes(ranking.units)
    for unit, text in ranking.written.items():
        weights[unit] = source.counter.count(text)
    return weights


class _Laid(NamedTuple):
    """Runs as columns; `unit` is what is written in its place, or -1."""

    document: Ints
    start: Ints
    end: Ints
    unit: Ints


def render(source: Source, ranking: Ranking, mask: Bools) -> tuple[Run, ...]:
    """The text that these units make, as runs of the source, documents in the ranking's order.

    Neighbours keep what is between them. Where something between two was dropped, one stretch of white space of what
    was dropped parts them, the one with the most line breaks; where there is none and two words would become one, the
    first mark between them stays. Units that need others are of a language that may read its white space: of what was
    dropped, that stays which stands right before what follows, so that lines keep their indentation, and their ends.
    """
    return _runs(_laid(source, ranking, mask), ranking)


def _runs(laid: _Laid, ranking: Ranking) -> tuple[Run, ...]:
    rows = zip(*(column.tolist() for column in laid), strict=True)
    return tuple(
        Run(document, start, end, ranking.written[unit] if unit >= 0 else None) for document, start, end, unit in rows
    )


def _text(documents: tuple[str, ...], laid: _Laid, ranking: Ranking, glue: str) -> str:
    """What `text_of` gives of these runs."""
    if ranking.written or len(documents) > 1:
        return text_of(documents, _runs(laid, ranking), glue)
    text = documents[0]
    return "".join([text[start:end] for start, end in zip(laid.start.tolist(), laid.end.tolist(), strict=True)])


def _laid(source: Source, ranking: Ranking, mask: Bools) -> _Laid:
    parts = [_document(source, document, ranking, mask) for document in ranking.order or range(len(source.documents))]
    return _Laid(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _document(source: Source, document: int, ranking: Ranking, mask: Bools) -> _Laid:
    text, mine = source.documents[document], ranking.units.of(document)
    kept = np.flatnonzero(mask[mine])
    if not len(kept):
        return _Laid(*[np.zeros(0, dtype=np.int64)] * 4)
    n = mine.stop - mine.start
    starts, ends = ranking.units.start[mine][kept], ranking.units.end[mine][kept]
    apart = np.flatnonzero(np.diff(kept) != 1)
    left, right = ends[:-1].copy(), starts[1:].copy()  # what is between two that stay
    shape, last = source.shapes[document], int(ends[-1])
    if ranking.needs is None:
        left[apart], right[apart] = _between(text, shape, left[apart], right[apart])
    else:
        left[apart] = np.maximum(shape.strip(left[apart], right[apart])[1], left[apart])
        last = broken.end() if (broken := _BREAK.match(text, last)) else last
    start, end = np.empty(2 * len(kept) + 1, dtype=np.int64), np.empty(2 * len(kept) + 1, dtype=np.int64)
    start[1::2], end[1::2], start[2:-1:2], end[2:-1:2] = starts, ends, left, right
    start[0], end[0] = 0 if kept[0] == 0 else starts[0], starts[0]
    start[-1], end[-1] = ends[-1], len(text) if kept[-1] == n - 1 else last
    unit = np.full(len(start), -1)
    if ranking.written:
        units = kept + mine.start
        unit[1::2] = np.where(np.isin(units, list(ranking.written)), units, -1)
    there = (start < end) | (unit >= 0)
    start, end, unit = start[there], end[there], unit[there]
    fresh = np.ones(len(start) + 1, dtype=bool)  # where a run starts: what touches is one run
    fresh[1:-1] = (start[1:] != end[:-1]) | (unit[1:] >= 0) | (unit[:-1] >= 0)
    start, end, unit = start[fresh[:-1]], end[fresh[1:]], unit[fresh[:-1]]
    return _Laid(np.full(len(start), document), start, end, unit)


def _between(text: str, shape: Shape, start: Ints, end: Ints) -> tuple[Ints, Ints]:
    """What parts two units when what was between them is gone."""
    left, right = start.copy(), start.copy()
    first, after = np.searchsorted(shape.right, start, side="right"), np.searchsorted(shape.left, end)
    found = after > first
    if found.any():
        # of those with the most breaks, the last; reduceat wants every index inside
        key = np.append(shape.breaks * (len(shape.breaks) + 1) + np.arange(len(shape.breaks)), -1)
        top = np.maximum.reduceat(key, np.stack([first[found], after[found]], 1).ravel())[::2] % (len(shape.breaks) + 1)
        left[found] = np.maximum(shape.left[top], start[found])
        whole = np.minimum(shape.right[top], end[found])
        right[found] = np.where(shape.breaks[top] > 0, whole, left[found] + 1)
    for gap in np.flatnonzero(~found & (start > 0) & (end < len(text))).tolist():
        a, b = int(start[gap]), int(end[gap])
        if _running(text[a - 1]) and _running(text[b]) and (mark := _MARK.search(text, a, b)):
            left[gap], right[gap] = shape.floor(np.array(mark.start())), shape.ceil(np.array(mark.end()))
    return left, right


@lru_cache(maxsize=4096)
def _running(character: str) -> bool:
    """Whether it is part of a word, in a script that puts spaces between words."""
    return _RUNNING.match(character) is not None


def text_of(documents: tuple[str, ...], runs: Sequence[Run], glue: str) -> str:
    """The text of these runs; `glue` where one document follows another."""
    parts: list[str] = []
    last = None
    for document, start, end, written in runs:
        piece = documents[document][start:end] if written is None else written
        if last is not None and document != last and piece:
            parts.append(glue)
        parts.append(piece)
        last = document if piece else last
    return "".join(parts)
