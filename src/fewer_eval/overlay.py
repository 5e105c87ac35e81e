"""Which patches of a picture were kept, and which went together, drawn on the picture."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DARK = 0.22
"""What is left of the light where a patch was dropped."""
LINE = (255, 255, 255)


def overlay(picture: Image.Image, assign: list[int], grid: tuple[int, int], patch: int) -> Image.Image:
    """The picture beside itself as the encoder's last block had it.

    Every token is an area of its members' mean colour, with a line around it; a patch that is a token by itself is
    shown as it is; dropped patches are dark.

    Args:
        picture: as large as the grid, `patch` pixels a patch.
        assign: for each patch, row by row, the number of its token; -1 where it was dropped.
        grid: rows and columns of patches.
        patch: pixels a side of a patch.
    """
    rows, columns = grid
    seen: NDArray[Any] = np.asarray(picture.convert("RGB"), dtype=np.float32)
    if seen.shape[:2] != (rows * patch, columns * patch) or len(assign) != rows * columns:
        raise ValueError(f"{len(assign)} patches of {patch} pixels do not make a picture of {picture.size}")
    slots = np.array(assign).reshape(rows, columns)
    cells = seen.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)  # (rows, columns, patch, patch, 3)
    drawn = cells.copy()
    for slot in np.unique(slots):
        members = slots == slot
        if slot < 0:
            drawn[members] *= DARK
        elif members.sum() > 1:
            drawn[members] = cells[members].mean((0, 1, 2))
    shown = drawn.swapaxes(1, 2).reshape(seen.shape)
    wide = np.kron(slots, np.ones((patch, patch), dtype=slots.dtype))
    edge = np.zeros(wide.shape, dtype=bool)
    edge[1:] |= wide[1:] != wide[:-1]
    edge[:, 1:] |= wide[:, 1:] != wide[:, :-1]
    shown[edge] = LINE
    both = np.concatenate([seen, np.full((len(seen), patch, 3), 255, np.float32), shown], 1)
    return Image.fromarray(both.round().astype(np.uint8))
