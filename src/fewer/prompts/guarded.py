"""What is protected, as units of their own: so it stays exactly, whatever a method's units are."""

from dataclasses import replace

import numpy as np

from fewer.prompts.needs import recut
from fewer.prompts.shape import Shape
from fewer.prompts.source import Ints, Protected, Ranking, Source, Units


def guarded(source: Source, ranking: Ranking) -> tuple[Ranking, list[str]]:
    """The ranking with units of their own for what is protected, and each unit's rule. A unit that holds something
    protected is not rewritten; one that others need, or that needs others, stays in one piece for all that."""
    if not source.protected:
        return ranking, [""] * len(ranking.units)
    columns: list[tuple[Ints, Ints, Ints]] = []  # start, end, the unit that each comes from or -1
    documents: list[int] = []
    rules: list[str] = []
    whole = np.ones(len(ranking.units), dtype=bool)
    pieces: list[tuple[Ints, Ints]] = []  # for each unit, which of the new ones are its pieces
    for document, shape in enumerate(source.shapes):
        mine = ranking.units.of(document)
        starts, ends = ranking.units.start[mine], ranking.units.end[mine]
        kept = _merged(shape, [p for p in source.protected if p.document == document])
        lefts = np.array([left for left, _, _ in kept], dtype=np.int64)
        rights = np.array([right for _, right, _ in kept], dtype=np.int64)
        first, after = np.searchsorted(rights, starts, side="right"), np.searchsorted(lefts, ends)
        touched = after > first
        whole[mine] = ~touched
        parts: list[tuple[int, int, int]] = []
        for unit in np.flatnonzero(touched).tolist():
            at = int(starts[unit])
            for left, right, _ in [*kept[first[unit] : after[unit]], (int(ends[unit]), 0, "")]:
                if at < left:
                    parts.append((at, left, unit))
                at = max(at, right)
        cut = np.array(parts, dtype=np.int64).reshape(-1, 3)
        begin, end = shape.strip(cut[:, 0], cut[:, 1])
        cut = np.stack([begin, end, cut[:, 2]], 1)[begin < end]
        near = np.searchsorted(starts, lefts, side="right") - 1
        alone = np.flatnonzero(~touched)
        together = np.concatenate([
            np.stack([starts[alone], ends[alone], alone, np.full(len(alone), -1)], 1),
            np.stack([*cut.T, np.full(len(cut), -1)], 1),
            np.stack([lefts, rights, near, np.arange(len(kept))], 1),
        ])  # fmt: skip
        together = together[np.argsort(together[:, 0], kind="stable")]
        came = np.where(together[:, 2] >= 0, together[:, 2] + mine.start, -1)
        firsts, afters = np.searchsorted(together[:, 1], starts, side="right"), np.searchsorted(together[:, 0], ends)
        pieces.append((firsts + len(rules), afters + len(rules)))
        columns.append((together[:, 0], together[:, 1], came))
        documents += [document] * len(came)
        rules += [kept[index][2] if index >= 0 else "" for index in together[:, 3].tolist()]
    lows, highs, index = (np.concatenate(column) for column in zip(*columns, strict=True))
    units = Units(np.array(documents, dtype=np.int64), lows, highs)
    value = np.where(index >= 0, ranking.value[index] if len(ranking.value) else 0.0, 0.0)
    chosen = None if ranking.chosen is None else (index >= 0) & ranking.chosen[index]
    written = {
        place: ranking.written[unit]
        for place, unit in (enumerate(index.tolist()) if ranking.written else ())
        if unit in ranking.written and whole[unit] and not rules[place]
    }
    needs = None if ranking.needs is None else recut(ranking.needs, *map(np.concatenate, zip(*pieces, strict=True)))
    return replace(ranking, units=units, value=value, chosen=chosen, written=written, needs=needs), rules


def _merged(shape: Shape, spans: list[Protected]) -> list[tuple[int, int, str]]:
    """In order, with whole graphemes; of two that overlap, the first names what both hold. Empty ones hold nothing."""
    out: list[tuple[int, int, str]] = []
    spans = sorted(span for span in spans if span.start < span.end)
    starts = shape.floor(np.array([span.start for span in spans], dtype=np.int64)).tolist()
    ends = shape.ceil(np.array([span.end for span in spans], dtype=np.int64)).tolist()
    for start, end, span in zip(starts, ends, spans, strict=True):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]), out[-1][2])
        else:
            out.append((start, end, span.rule))
    return out
