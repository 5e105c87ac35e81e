"""Mini-Monkey's compression: the whole view stays, fine crops give what the words do not look at."""

from dataclasses import replace

import pytest
import torch

from fewer.errors import FewerError
from fewer.methods.vlm.mini_monkey import MiniMonkey
from tests.methods.vlm.build import lay, place, random
from tests.methods.vlm.look import asked, attention, look, turned
from tests.methods.vlm.run import kept, through


def test_worked_example() -> None:
    layout = lay([(1, 2), (1, 2), (1, 2)], whole=(2,))  # two fine crops, then the whole picture
    tokens = place(6, layout=layout, looked=asked([[3, 0, 2, 1, 0, 0.5]]))
    assert kept(MiniMonkey(), tokens, 4) == [0, 2, 4, 5]
    assert kept(MiniMonkey(), tokens, 2) == [4, 5]
    assert kept(MiniMonkey(), tokens, 1) == [5]  # the better of the whole view


def test_against_plain_python() -> None:
    looked = look(12, seed=2)
    maps = attention(looked)
    mean = [sum(head[i][3 + j] for head in maps for i in range(3, 9)) for j in range(12)]
    whole = [4, 5, 6, 7]
    rest = sorted(set(range(12)) - set(whole), key=lambda j: -mean[j])[:3]
    tokens = place(12, layout=lay([(2, 2)] * 3, whole=(1,)), looked=looked)
    assert kept(MiniMonkey(), tokens, 7) == sorted(whole + rest)


def test_without_a_whole_view() -> None:
    looked = look(9, seed=1)
    best = looked.attention(torch.arange(3, 9)).mean((0, 1)).topk(4).indices.sort().values.tolist()
    assert kept(MiniMonkey(), place(9, grid=(3, 3), looked=looked), 4) == best


def test_a_word_among_the_crops_does_not_ask() -> None:
    """It sees only what comes before it."""
    query = random(4, 21, 8, seed=1)
    looked = look(12, seed=2, query=query)
    assert looked.turns is not None
    text = torch.tensor([0, 1, 2, 8, *range(15, 21)])
    looked = replace(
        looked,
        query=turned(query, *looked.turns)[:, text],
        plain_query=query[:, text],
        visual=torch.tensor([j for j in range(3, 15) if j != 8]),
        text=text,
        states=random(10, 8),
        after=text >= 3,
    )
    maps = attention(looked)
    mean = [sum(head[i][j] for head in maps for i in range(4, 10)) for j in looked.visual.tolist()]
    tokens = place(11, looked=looked)
    assert MiniMonkey().score(tokens)[0].argsort().tolist() == sorted(range(11), key=lambda j: mean[j])


def test_ties_and_extremes() -> None:
    tokens = place(5, looked=asked([[1, 1, 1, 1, 1]]))
    assert kept(MiniMonkey(), tokens, 4) == [1, 2, 3, 4]
    assert kept(MiniMonkey(), tokens, 1) == [4]


def test_bad_layer() -> None:
    with pytest.raises(FewerError, match="layer=0"):
        MiniMonkey(layer=0)
    assert MiniMonkey().after(32) == (1,)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_through_a_model(family: str) -> None:
    assert {after for after, _ in through(family, "mini-monkey")} == {1}
