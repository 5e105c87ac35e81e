"""CMAI: a token leaves if no word, nor what it reads, is about it."""

import math

import pytest
import torch

from fewer.errors import FewerError
from fewer.methods.vlm.cmai import CMAI
from tests.methods.vlm.build import place
from tests.methods.vlm.look import asked, attention, look
from tests.methods.vlm.run import kept, through


def test_worked_example() -> None:
    """Two words after three tokens. The first gives e^2, 1, 1 to the tokens and 1 to itself; the second 1, 1, e to
    them and 1 to each word, through which it looks at token 0 once more."""
    tokens = place(3, looked=asked([[2, 0, 0], [0, 0, 1]]))
    e = math.e
    first, second = [e * e, 1, 1], [1, 1, e]
    one, two = e * e + 3, e + 4
    focus = [
        [x / one * (1 / one) for x in first],
        [x / one * (1 / two) + y / two * (1 / two) for x, y in zip(first, second, strict=True)],
    ]
    torch.testing.assert_close(
        CMAI().score(tokens)[0], torch.tensor([max(column) for column in zip(*focus, strict=True)])
    )
    assert kept(CMAI(), tokens, 2) == [0, 2]


def test_against_plain_python() -> None:
    looked = look(9, seed=6)
    maps = attention(looked)
    mean = [[sum(head[i][j] for head in maps) / 4 for j in range(18)] for i in range(3, 9)]
    focus = [[sum(row[12 + k] * mean[k][3 + j] for k in range(6)) for j in range(9)] for row in mean]
    scores = [max(column) for column in zip(*focus, strict=True)]
    tokens = place(9, looked=looked)
    torch.testing.assert_close(CMAI().score(tokens)[0], torch.tensor(scores))
    assert kept(CMAI(), tokens, 4) == sorted(sorted(range(9), key=lambda j: -scores[j])[:4])


def test_ties_and_extremes() -> None:
    tokens = place(5, looked=asked([[1, 1, 1, 1, 1]]))
    assert kept(CMAI(), tokens, 4) == [1, 2, 3, 4]
    assert kept(CMAI(), tokens, 1) == [4]


def test_bad_layer() -> None:
    with pytest.raises(FewerError, match="layer=0"):
        CMAI(layer=0)
    assert CMAI().after(32) == (1,)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_through_a_model(family: str) -> None:
    assert {after for after, _ in through(family, "cmai")} == {1}
