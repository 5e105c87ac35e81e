"""Sentences that belong together, by their vectors, and how many tokens each lot of them may have."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def coherent(vectors: Floats, sizes: Floats, documents: Sequence[int], alike: float, longest: int) -> list[range]:
    """Runs of sentences: one joins the run before it if it is like its mean (cosine of at least `alike`), of the same
    document, and the run has no more than `longest` tokens with it.

    >>> coherent(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), np.full(3, 5.0), [0, 0, 0], 0.5, 99)
    [range(0, 2), range(2, 3)]
    """
    runs: list[range] = []
    total, held = np.zeros(vectors.shape[1]), 0.0
    for i, (vector, size, document) in enumerate(zip(vectors, sizes.tolist(), documents, strict=True)):
        joins = (
            runs
            and documents[runs[-1].start] == document
            and held + size <= longest
            and cosine(total[None], vector)[0] >= alike
        )
        if joins:
            runs[-1] = range(runs[-1].start, i + 1)
            total, held = total + vector, held + size
        else:
            runs.append(range(i, i + 1))
            total, held = vector.copy(), size
    return runs


def cosine(vectors: Floats, other: Floats) -> Floats:
    """Of each vector with the other one; 0 where one of them is 0."""
    length = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(other)
    found: Floats = vectors @ other / np.where(length > 0, length, 1.0)
    return found


def allowed(sizes: Floats, weights: Floats, room: float) -> Floats:
    """How many tokens each may have: in proportion to `sizes * weights`, none more than it has, `room` together.

    >>> allowed(np.array([10.0, 10.0, 4.0]), np.array([1.0, 1.0, 9.0]), 14.0)
    array([5., 5., 4.])
    """
    out = np.zeros(len(sizes))
    open_ = np.ones(len(sizes), dtype=bool)
    while open_.any():
        parts = np.where(open_, sizes * weights, 0.0)
        out = np.where(open_, parts * max(room - sizes[~open_].sum(), 0.0) / max(parts.sum(), 1e-9), sizes)
        over = open_ & (out >= sizes)
        if not over.any():
            break
        out, open_ = np.where(over, sizes, out), open_ & ~over
    return out


def best(value: Floats, sizes: Floats, room: float) -> NDArray[np.bool_]:
    """Which to take, those of most value first, each that still fits."""
    out = np.zeros(len(value), dtype=bool)
    for i in np.argsort(-value, kind="stable"):
        if sizes[i] <= room:
            out[i] = True
            room -= float(sizes[i])
    return out
