"""The drawing of kept and merged patches, on a picture of four patches."""

import numpy as np
import pytest
from PIL import Image

from fewer_eval.overlay import DARK, LINE, overlay


def test_worked_example() -> None:
    """Patches of 4 pixels: the upper two are one token, the lower left is dropped, the lower right is a token itself.

    The upper two, red 100 and red 200, become red 150; the dropped one keeps a part of its light; lines run where
    tokens meet.
    """
    seen = np.zeros((8, 8, 3), np.uint8)
    seen[:4, :4], seen[:4, 4:], seen[4:, :4], seen[4:, 4:] = (100, 0, 0), (200, 0, 0), (0, 100, 0), (0, 0, 77)
    drawn = np.asarray(overlay(Image.fromarray(seen), [0, 0, -1, 1], (2, 2), 4))
    assert drawn.shape == (8, 8 + 4 + 8, 3)
    assert np.array_equal(drawn[:, :8], seen), "the picture itself stands beside it"
    right = drawn[:, 12:]
    assert right[1, 1].tolist() == right[1, 6].tolist() == [150, 0, 0]
    assert right[6, 1].tolist() == [0, round(100 * DARK), 0]
    assert right[6, 6].tolist() == [0, 0, 77]
    assert right[4, 1].tolist() == list(LINE) and right[6, 4].tolist() == list(LINE)
    assert right[1, 4].tolist() == [150, 0, 0], "no line inside a token"


def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="4 patches of 4 pixels"):
        overlay(Image.new("RGB", (8, 12)), [0, 0, 0, 0], (2, 2), 4)
