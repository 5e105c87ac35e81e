"""PyramidDrop: the last token's attention at a quarter, a half and three quarters of the depth."""

import pytest
import torch

from fewer.errors import FewerError
from fewer.methods.vlm.pyramiddrop import PyramidDrop
from tests.methods.vlm.build import place
from tests.methods.vlm.look import asked, attention, look
from tests.methods.vlm.run import kept, through


def test_worked_example() -> None:
    looked = asked([[9, 0, 0, 0], [0, 3, 1, 2]])  # the first word looks at token 0, the last at 1, 3, 2
    tokens = place(4, looked=looked)
    assert kept(PyramidDrop(), tokens, 2) == [1, 3]
    assert kept(PyramidDrop(), tokens, 3) == [1, 2, 3]


def test_against_plain_python() -> None:
    looked = look(10, seed=4)
    tokens = place(10, looked=looked)
    last = [head[-1][3:13] for head in attention(looked)]
    mean = [sum(column) / 4 for column in zip(*last, strict=True)]
    torch.testing.assert_close(PyramidDrop().score(tokens)[0], torch.tensor(mean))
    assert kept(PyramidDrop(), tokens, 4) == sorted(sorted(range(10), key=lambda j: -mean[j])[:4])


def test_stages_follow_the_depth() -> None:
    assert PyramidDrop().after(32) == (7, 15, 23)  # layers 8, 16 and 24 are the first to read fewer
    assert PyramidDrop().after(28) == (6, 13, 20)
    assert PyramidDrop().after(2) == (0,)


def test_ties_and_extremes() -> None:
    tokens = place(5, looked=asked([[1, 1, 1, 1, 1]]))
    assert kept(PyramidDrop(), tokens, 4) == [1, 2, 3, 4]
    assert kept(PyramidDrop(), tokens, 1) == [4]


def test_bad_stages() -> None:
    for stages in ((), (0.5, 1.0), (0.0,)):
        with pytest.raises(FewerError, match="shares of the depth"):
            PyramidDrop(stages=stages)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_through_a_model(family: str) -> None:
    cuts = through(family, "pyramiddrop", 0.125)
    assert {after for after, _ in cuts} == {0, 1, 2}
    if family == "llava":  # the same share leaves at each cut
        assert [count for _, count in cuts] == [19] * 3 + [10] * 3 + [5] * 3
