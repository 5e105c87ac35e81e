"""FEATHER: attention without positions, and a grid at the first cut."""

import math

import pytest
import torch

from fewer.errors import FewerError
from fewer.methods.vlm.feather import Feather
from fewer.types import Site
from tests.methods.vlm.build import lay, place
from tests.methods.vlm.look import asked, look
from tests.methods.vlm.run import kept, through

FIRST, SECOND = Site(7, 32, "prefill", 0, (6, 6)), Site(15, 32, "prefill", 1, (6, 6))


def test_worked_example() -> None:
    looked = asked([[0, 5, 4, 0, 0, 3, 0, 0, 0]])
    first, second = (place(9, grid=(3, 3), looked=looked, site=Site(after, 32)) for after in (7, 15))
    assert kept(Feather(stride=2), first, 5) == [0, 1, 2, 6, 8]  # the corners are the grid, then the best of the others
    assert kept(Feather(stride=2), first, 3) == [2, 6, 8]  # a grid that is too large: its best, the last where alike
    assert kept(Feather(stride=2), second, 3) == [1, 2, 5]


def test_against_plain_python() -> None:
    looked = look(12, seed=2)
    total = [0.0] * 12
    for head, rows in enumerate(looked.plain_query.tolist()):
        keys = looked.plain_key[head // 2, 3:15].tolist()
        e = [math.exp(looked.scaling * sum(a * b for a, b in zip(rows[-1], key, strict=True))) for key in keys]
        total = [t + x / sum(e) / 4 for t, x in zip(total, e, strict=True)]
    scores = Feather().score(place(12, looked=looked, site=SECOND))[0]
    torch.testing.assert_close(scores, torch.tensor(total))


def test_positions_do_not_count() -> None:
    moved, still = look(12, seed=3), look(12, seed=3, still=True)
    for site in (FIRST, SECOND):
        assert torch.equal(
            Feather().score(place(12, looked=moved, site=site)), Feather().score(place(12, looked=still, site=site))
        )


def test_as_the_authors() -> None:
    """Numbers of a port of their model's two cuts (r=0.3, stride 3) on these queries and keys: the first is a union of
    10 with 4 tokens of the grid, of which none is among the 10."""
    looked = look(36, seed=1)
    union = [0, 1, 2, 3, 9, 10, 12, 16, 18, 20, 21, 22, 25, 27]
    assert kept(Feather(), place(36, grid=(6, 6), looked=looked, site=FIRST), 14) == union
    best = [1, 2, 10, 12, 16, 20, 22, 27]
    assert kept(Feather(), place(36, grid=(6, 6), looked=looked, site=SECOND), 8) == best


def test_every_crop_has_a_grid() -> None:
    layout = lay([(3, 3), (3, 3)])
    tokens = place(18, layout=layout, looked=look(18), site=FIRST)
    assert kept(Feather(stride=2), tokens, 8) == [0, 2, 6, 8, 9, 11, 15, 17]


def test_path_and_stages() -> None:
    assert Feather().after(32) == (7, 15)
    assert Feather().path(2) == (1 / 3, 1.0)
    assert Feather().path(1) == (1.0,)  # where two cuts fall on one layer


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="rising"):
        Feather(stages=(0.5, 0.25))
    with pytest.raises(FewerError, match="stride=0"):
        Feather(stride=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_through_a_model(family: str) -> None:
    assert {after for after, _ in through(family, "feather")} == {0, 1}
