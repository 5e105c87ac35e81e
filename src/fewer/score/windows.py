"""Who stays, decided window after window: surprise at a token depends on what stayed before it."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewer.prompts.source import Bools, Floats, Source, Units
from fewer.score.surprise import Prefix, Reader
from fewer.types import Budget, FewerError

GLUE = "\n\n"
"""What parts documents when they are read one after the other."""


class Read(NamedTuple):
    """A source's documents in a reader's tokens: ids and offsets `(n, 2)` of each document, and the units they make."""

    ids: tuple[list[int], ...]
    offsets: tuple[NDArray[np.int64], ...]
    units: Units

    def __len__(self) -> int:
        return sum(map(len, self.ids))

    @classmethod
    def of(cls, source: Source, reader: Reader) -> "Read":
        """Every document, as that reader's tokens."""
        both = [reader.tokens(text) for text in source.documents]
        offsets = tuple(places for _, places in both)
        return cls(tuple(ids for ids, _ in both), offsets, source.tokens(offsets))

    def place(self, document: int) -> NDArray[np.int64]:
        """The unit that each of a document's tokens belongs to, -1 for white space."""
        mine, pairs = self.units.of(document), self.offsets[document]
        found = np.searchsorted(self.units.end[mine], pairs[:, 0], side="right")
        starts = np.append(self.units.start[mine], np.iinfo(np.int64).max)
        return np.where(starts[found] < pairs[:, 1], mine.start + found, -1)


def until(read: Read, ranked: Iterable[int], tokens: float) -> list[int]:
    """The first of the ranked documents, with the one in which the tokens run out."""
    out: list[int] = []
    for document in ranked:
        out.append(document)
        tokens -= len(read.ids[document])
        if tokens < 0:
            break
    return out


def target(source: Source, budget: Budget, read: Read) -> float:
    """How many of the reader's tokens may stay: the budget, which counts tokens of another tokenizer perhaps."""
    whole = max(sum(map(len, source.ends)), 1)
    return len(read) * budget.count(whole) / whole


def pruned(
    source: Source,
    read: Read,
    order: Sequence[int],
    shares: Sequence[float],
    prefixes: tuple[Prefix, ...],
    window: int,
    rest: Sequence[int] = (),
) -> tuple[Floats, Bools]:
    """A value for each unit, and who stays.

    A window of tokens is tried after what stayed of those before it. Those of highest surprise stay, as many as the
    share of their document says; their value says by how many nats they are above those that go. Protected text and
    white space are always part of what stayed.

    Args:
        order: the documents to read, in reading order.
        shares: for each of these, the share of its tokens that stays.
        prefixes: one gives surprise as it is; of two, the second's is taken from the first's.
        rest: the other documents, best first: their units are worth less than all that were read.
    """
    if window < 1:
        raise FewerError(f"window={window}: a window is one token at least; 200 are usual")
    n = len(read.units)
    value, chosen, decided = np.zeros(n), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    forced, share = protected_units(source, read.units), np.zeros(n)
    ids: list[int] = []
    places: list[NDArray[np.int64]] = []
    glue = prefixes[0].reader.tokens(GLUE)[0]
    for document, part in zip(order, shares, strict=True):
        share[read.units.of(document)] = part
        between = glue if ids else []
        ids += between + read.ids[document]
        places += [np.full(len(between), -1), read.place(document)]
    place = np.concatenate(places) if places else np.zeros(0, dtype=np.int64)
    owed: dict[float, float] = {}  # of each share, tokens that may still stay: rounding is carried over
    step = min(window, *(prefix.most for prefix in prefixes))
    for at in range(0, len(ids) if n else 0, step):
        part_ids, mine = ids[at : at + step], place[at : at + step]
        seen = [prefix.tried(part_ids) for prefix in prefixes]
        token = seen[0] - seen[1] if len(seen) == 2 else seen[0]
        new = mine >= 0
        new[new] = ~decided[mine[new]]
        units, back, count = np.unique(mine[new], return_inverse=True, return_counts=True)
        mean = np.bincount(back, token[new], len(units)) / np.maximum(count, 1)
        for part in np.unique(share[units]):
            of_it = share[units] == part
            here = np.flatnonzero(of_it & ~forced[units])
            owed[part] = owed.get(part, 0.0) + part * count[of_it].sum() - count[of_it & forced[units]].sum()
            ranked = here[np.argsort(-mean[here], kind="stable")]
            take = int(np.searchsorted(np.cumsum(count[ranked]), owed[part] + 0.5, side="right"))
            owed[part] -= count[ranked[:take]].sum()
            chosen[units[ranked[:take]]] = True
            near = mean[ranked[max(take - 1, 0) : take + 1]]  # the last to stay and the first to go
            value[units[here]] = mean[here] - (near.mean() if len(near) else 0.0)
        decided[units] = True
        stays = (mine < 0) | chosen[mine] | forced[mine]
        kept = [token for token, stay in zip(part_ids, stays.tolist(), strict=True) if stay]
        for prefix in prefixes:
            prefix.keep(kept)
    least = value.min(initial=0.0)
    for rank, document in enumerate(rest):
        value[read.units.of(document)] = least - 1.0 - rank
    return value, chosen


def protected_units(source: Source, units: Units) -> Bools:
    """The units that protected text touches `(n,)`."""
    out = np.zeros(len(units), dtype=bool)
    for span in source.protected:
        mine: Any = units.of(span.document)
        first = mine.start + np.searchsorted(units.end[mine], span.start, side="right")
        out[first : mine.start + np.searchsorted(units.start[mine], span.end, side="left")] = True
    return out
