"""Which of some pieces to take so that they are worth most and still fit: the 0/1 knapsack."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

PIECES, ROOM = 100, 2000
"""Up to so many pieces and so much room the answer is exact (LongCodeZip's limits)."""


def knapsack(value: ArrayLike, weight: ArrayLike, room: int) -> NDArray[np.bool_]:
    """Which pieces to take, `(n,)`: worth most together, and together no heavier than `room`.

    Exact for up to `PIECES` pieces and `ROOM`; beyond, greedy by worth a unit of weight. What is worth nothing or
    less is never taken.

    Args:
        value: what each piece is worth.
        weight: whole numbers from 0 on.

    >>> knapsack([10.0, 6.0, 6.0], [5, 3, 3], 6)
    array([False,  True,  True])
    """
    worth, heavy = np.asarray(value, dtype=np.float64), np.asarray(weight, dtype=np.int64)
    taken = np.zeros(len(worth), dtype=bool)
    open_ = np.flatnonzero((worth > 0) & (heavy <= room))
    if len(open_) > PIECES or room > ROOM:
        for piece in open_[np.argsort(-worth[open_] / np.maximum(heavy[open_], 1), kind="stable")]:
            if heavy[piece] <= room:
                taken[piece] = True
                room -= int(heavy[piece])
        return taken
    best = np.zeros((len(open_) + 1, max(room, 0) + 1))  # of the first i pieces, in each room
    for i, piece in enumerate(open_):
        w = heavy[piece]
        best[i + 1] = best[i]
        with_it = best[i, : len(best[i]) - w] + worth[piece]
        best[i + 1, w:] = np.maximum(best[i, w:], with_it)
    for i in range(len(open_) - 1, -1, -1):
        if best[i + 1, room] > best[i, room]:
            taken[open_[i]] = True
            room -= int(heavy[open_[i]])
    return taken
