"""Units that are nothing without others: a statement without the function around it, a table's cell without its row.

Pairs `(m, 2)`: the first unit of each needs the second. What needs a unit goes when it goes; what it needs stays when
it stays. Two units that need each other stay or go together; one that needs itself stays in one piece where something
in it is protected.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Pull = Callable[[int, Bools], list[int]]


def pulling(needs: Ints | None, n: int) -> Pull:
    """A function from a unit, and which of the `n` units are there already, to that unit and all that it still needs.

    >>> pulling(np.array([[2, 1], [1, 0]]), 3)(2, np.array([True, False, False]))
    [2, 1]
    """
    if needs is None or not len(needs):
        return lambda unit, there: [unit]
    pairs = needs[np.argsort(needs[:, 0], kind="stable")]
    first, other = np.searchsorted(pairs[:, 0], np.arange(n + 1)).tolist(), pairs[:, 1].tolist()

    def pull(unit: int, there: Bools) -> list[int]:
        found, todo = {unit}, [unit]
        out = [unit]
        while todo:
            at = todo.pop()
            for wanted in other[first[at] : first[at + 1]]:
                if wanted not in found and not there[wanted]:
                    found.add(wanted)
                    todo.append(wanted)
                    out.append(wanted)
        return out

    return pull


def closed(mask: Bools, pull: Pull) -> Bools:
    """These units, and all that they need."""
    out = np.zeros_like(mask)
    for unit in np.flatnonzero(mask).tolist():
        if not out[unit]:
            out[pull(unit, out)] = True
    return out


def steps(order: Ints, needs: Ints | None) -> tuple[Ints, Ints]:
    """The units in this order, each with what it needs beside it, and where the order may be cut `(k + 1,)`, from 0 on:
    what stands before a cut needs nothing behind it."""
    if needs is None or not len(needs):
        return order, np.arange(len(order) + 1)
    pull, there = pulling(needs, len(order)), np.zeros(len(order), dtype=bool)
    out: list[int] = []
    cuts = [0]
    for unit in order.tolist():
        if not there[unit]:
            more = pull(unit, there)
            there[more] = True
            out += more
            cuts.append(len(out))
    return np.array(out, dtype=np.int64), np.array(cuts, dtype=np.int64)


def recut(needs: Ints, first: Ints, after: Ints) -> Ints:
    """The pairs of units that were cut: unit `i` is pieces `first[i]` to `after[i]` now, each of which needs the
    others if any pair names the unit."""
    rings = [np.stack([first[needs[:, 0]], first[needs[:, 1]]], 1)]
    named = np.unique(needs)
    for left, right in zip(first[named].tolist(), after[named].tolist(), strict=True):
        if right - left > 1:
            pieces = np.arange(left, right)
            rings.append(np.stack([pieces, np.roll(pieces, -1)], 1))
    return np.concatenate(rings)
