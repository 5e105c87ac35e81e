"""Which units stay, so that the text has no more tokens than were asked for: counted on the text itself.

Protected text stays whatever it is worth. The others follow by what the method says they are worth, and where the cut
falls is found by counting the tokens of the text that it gives: an estimate from the tokens of the source says where
to look first, and what is left over is filled with units that still fit.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import regex

from fewer.prompts.source import Bools, Floats, Ints, Ranking, Source, Units, graphemes
from fewer.types import BudgetError

NEAR = 1 / 500
"""How near the ceiling is near enough, as a share of it: on long texts each token nearer costs another count."""

FILL, SHORT = 16, 2000
"""Units that are tried at the end, one by one, where the ceiling is no more than so many tokens."""

_SPACE = regex.compile(r"\s+")


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
    ranking, rules = guarded(source, ranking)
    forced = np.array([bool(rule) for rule in rules], dtype=bool)
    chosen = np.zeros(len(rules), dtype=bool) if ranking.chosen is None else ranking.chosen
    order = np.lexsort((np.arange(len(rules)), -ranking.value, ~chosen, ~forced))

    def of(count: int, more: Ints | None = None) -> tuple[Bools, tuple[Run, ...], int]:
        mask = np.zeros(len(rules), dtype=bool)
        mask[order[:count]] = True
        if more is not None:
            mask[more] = True
        runs = render(source, ranking, mask)
        return mask, runs, source.counter.count(text_of(source.documents, runs, glue))

    if limit is None:
        mask, runs, tokens = of(int((forced | chosen).sum()))
        return Kept(ranking, mask, rules, runs, tokens)
    must = int(forced.sum())
    best = of(must)
    if best[2] > limit:
        raise BudgetError(
            f"what is protected takes {best[2]} tokens of {source.counter.name} and {limit} may stay; "
            f"allow at least {best[2]}, or protect less"
        )
    low, high = must, len(rules) + 1  # `low` units fit; `high` do not
    weights = np.cumsum(_weights(source, ranking)[order])
    scale = 1.0
    for _ in range(64):
        if high - low <= 1 or limit - best[2] <= NEAR * limit:
            break
        goal = best[2] + (limit - best[2]) * 0.998
        base = weights[low - 1] if low else 0.0
        guess = int(np.searchsorted(weights, base + (goal - best[2]) * scale, side="right"))
        guess = min(max(guess, low + 1), high - 1)
        tried = of(guess)
        took = weights[guess - 1] - base
        if took > 0 and tried[2] > best[2]:
            scale = float(np.clip(took / (tried[2] - best[2]), 0.25, 4.0))
        if tried[2] <= limit:
            low, best = guess, tried
        else:
            high = guess
    added: list[int] = []
    for unit in order[low : low + FILL] if limit <= SHORT else ():
        if best[2] >= limit:
            break
        tried = of(low, np.array([*added, unit]))
        if tried[2] <= limit:
            best = tried
            added.append(int(unit))
    return Kept(ranking, best[0], rules, best[1], best[2])


def guarded(source: Source, ranking: Ranking) -> tuple[Ranking, list[str]]:
    """The ranking with units of their own for what is protected, and each unit's rule."""
    if not source.protected:
        return ranking, [""] * len(ranking.units)
    spans: list[tuple[int, int, int]] = []
    came: list[int] = []  # the unit that each comes from, -1 for none
    rules: list[str] = []
    edges = [graphemes(text) for text in source.documents]
    for document in range(len(source.documents)):
        kept: list[tuple[int, int, str]] = []
        for _, start, end, rule in sorted(p for p in source.protected if p.document == document):
            start, end = _outside(edges[document], start), edges[document](end)
            if start >= end:
                continue
            if kept and start < kept[-1][1]:  # they overlap: the first names what both hold
                kept[-1] = (kept[-1][0], max(end, kept[-1][1]), kept[-1][2])
            else:
                kept.append((start, end, rule))
        mine = ranking.units.of(document)
        starts, ends = ranking.units.start[mine].tolist(), ranking.units.end[mine].tolist()
        parts: list[tuple[int, int, int, str]] = []
        for unit, start, end in zip(range(mine.start, mine.stop), starts, ends, strict=True):
            at = start
            for left, right, _ in _touching(kept, start, end):
                if unit in ranking.written:
                    continue
                if at < left:
                    parts.append((at, left, unit, ""))
                at = max(at, right)
            if at < end:
                parts.append((at, end, unit, ""))
        inside = ranking.units.start[mine]
        for left, right, rule in kept:
            near = int(np.searchsorted(inside, left, side="right")) - 1
            unit = mine.start + near if near >= 0 else -1
            parts.append((left, right, unit, rule))
        for left, right, unit, rule in sorted(parts):
            left, right = _stripped(source.documents[document], left, right) if not rule else (left, right)
            if left < right:
                spans.append((document, left, right))
                came.append(unit)
                rules.append(rule)
    index = np.array(came, dtype=np.int64)
    value = np.where(index >= 0, ranking.value[index] if len(ranking.value) else 0.0, 0.0)
    chosen = None if ranking.chosen is None else (index >= 0) & ranking.chosen[index]
    written = {i: ranking.written[unit] for i, unit in enumerate(came) if unit in ranking.written and not rules[i]}
    return replace(ranking, units=Units.made(spans), value=value, chosen=chosen, written=written), rules


def _outside(edge: Callable[[int], int], start: int) -> int:
    """The start of the grapheme that this offset is in."""
    while start > 0 and edge(start) != start:
        start -= 1
    return start


def _touching(kept: list[tuple[int, int, str]], start: int, end: int) -> list[tuple[int, int, str]]:
    first = bisect_left(kept, start, key=lambda span: span[1] - 1)
    out = []
    for span in kept[first:]:
        if span[0] >= end:
            break
        out.append(span)
    return out


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _weights(source: Source, ranking: Ranking) -> Floats:
    """About how many tokens each unit adds: those that end in it or in the white space before it."""
    units, weights = ranking.units, np.zeros(len(ranking.units))
    for document in range(len(source.documents)):
        mine = units.of(document)
        ends = np.sort(source.ends[document])
        after = np.searchsorted(ends, units.end[mine], side="right")
        weights[mine] = np.diff(after, prepend=0)
    for unit, text in ranking.written.items():
        weights[unit] = source.counter.count(text)
    return weights


def render(source: Source, ranking: Ranking, mask: Bools) -> tuple[Run, ...]:
    """The text that these units make, as runs of the source, documents in the ranking's order.

    Neighbours keep what is between them. Where something between two was dropped, one stretch of white space of what
    was dropped parts them, the one with the most line breaks; where there is none and two words would become one, the
    first mark between them stays.
    """
    order = ranking.order if ranking.order is not None else range(len(source.documents))
    runs: list[Run] = []
    for document in order:
        runs += _document(source.documents[document], document, ranking, mask)
    return tuple(runs)


def _document(text: str, document: int, ranking: Ranking, mask: Bools) -> list[Run]:
    mine = ranking.units.of(document)
    starts, ends = ranking.units.start[mine].tolist(), ranking.units.end[mine].tolist()
    kept = np.flatnonzero(mask[mine]).tolist()
    runs: list[Run] = []
    if not kept:
        return runs
    at = 0 if kept[0] == 0 else starts[kept[0]]  # where the open run starts
    for before, unit in pairwise([None, *kept]):
        if before is not None and unit != before + 1:
            left, right = _between(text, ends[before], starts[unit])
            runs.append(Run(document, at, ends[before]))
            if left < right:
                runs.append(Run(document, left, right))
            at = starts[unit]
        if (written := ranking.written.get(mine.start + unit)) is not None:
            if at < starts[unit]:
                runs.append(Run(document, at, starts[unit]))
            runs.append(Run(document, starts[unit], ends[unit], written))
            at = ends[unit]
    runs.append(Run(document, at, len(text) if kept[-1] == len(starts) - 1 else ends[kept[-1]]))
    joined: list[Run] = []
    for run in runs:
        if run.written is None and run.start >= run.end:
            continue
        last = joined[-1] if joined else None
        if last is not None and last.end == run.start and last.written is None and run.written is None:
            joined[-1] = Run(document, last.start, run.end)
        else:
            joined.append(run)
    return joined


def _between(text: str, start: int, end: int) -> tuple[int, int]:
    """What parts two units when what was between them is gone."""
    best = (0, 0)
    most = -1
    for match in _SPACE.finditer(text, start, end):
        left, right = match.span()
        breaks = text.count("\n", left, right)
        if breaks >= most:
            best, most = ((left, right) if breaks else (left, left + 1)), breaks
    if most >= 0:
        return best
    if start and end < len(text) and text[start - 1].isalnum() and text[end].isalnum():
        for match in regex.finditer(r"\X", text, pos=start, endpos=end):
            if not match.group().isalnum():
                return match.start(), match.end()
    return start, start


def text_of(documents: tuple[str, ...], runs: tuple[Run, ...], glue: str) -> str:
    """The text of these runs, documents joined by `glue`."""
    parts: list[str] = []
    last = None
    for document, start, end, written in runs:
        if last is not None and document != last:
            parts.append(glue)
        parts.append(documents[document][start:end] if written is None else written)
        last = document
    return "".join(parts)
