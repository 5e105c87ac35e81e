"""How far the meaning of a text moves when a piece of it is left out: 1 - cos(e(text), e(text without it))."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fewer.score.embed import Embedder

AT_ONCE = 4096
"""Texts that are written out at once, which bounds memory."""


def moved(embed: Embedder, texts: Sequence[str], pieces: Sequence[Sequence[tuple[int, int]]]) -> NDArray[np.float64]:
    """What leaving out each piece `(start, end)` of each text does, one number a piece, `(pieces in all,)`."""
    out = np.zeros(sum(map(len, pieces)))
    whole = embed(texts).double()
    cuts = [(i, start, end) for i, mine in enumerate(pieces) for start, end in mine]
    for at in range(0, len(cuts), AT_ONCE):
        some = cuts[at : at + AT_ONCE]
        without = embed([texts[i][:start] + texts[i][end:] for i, start, end in some]).double()
        same = (without * whole[[i for i, _, _ in some]]).sum(-1)
        out[at : at + len(some)] = 1 - same.numpy()
    return out
