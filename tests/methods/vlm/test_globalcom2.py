"""GlobalCom2: the thumbnail says how much of each crop stays, and helps to say what."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fewer
from fewer.errors import FewerError, MissingSignal
from fewer.methods.vlm.globalcom2 import GlobalCom2
from fewer.score import crops
from fewer.signals.visual import By, Layout, TowerView
from tests.methods.vlm.build import decide, kept, lay, place, random, view
from tests.vlms import FAMILIES


def cut_up(rows: int, columns: int, side: int, pad: int = 0) -> Layout:
    """A thumbnail, then crops; of the canvas that they make, `pad` rows at the top and at the bottom are no picture."""
    regions = [(0.0, 0.0, 1.0, 1.0)]
    regions += [(r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)]
    full = lay([(side, side)] * len(regions), (0,), torch.tensor(regions))
    y = (full.crop - 1) // columns * side + full.y
    return full.take((full.crop == 0) | ((y >= pad) & (y < rows * side - pad)))


def says(logits: Tensor) -> TowerView:
    return TowerView(logits.softmax(-1).unsqueeze(0), logits.unsqueeze(0), torch.zeros(1, len(logits), 2))


def test_worked_example() -> None:
    """A thumbnail of one row of two tokens, 10 and 0, over two crops of one row of two. Of the softmax of 10 / 10 and 0
    the crops get 0.731 and 0.269, so the first keeps 1.231 times what its size asks for and the second 0.769 times. Of
    three of all six tokens, each has 1; of four, the thumbnail and the first crop have 1.33 and 1.64, the second 1.03.

    Enlarged to four places the thumbnail is 10, 7.5, 2.5, 0. In the first crop, where both tokens have the same logit,
    the first wins by it."""
    grids = [(1, 2)] * 3
    layout = lay(grids, (0,), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0.5, 1, 1]]))
    tokens = place(6, layout=layout, tower=says(torch.tensor([10.0, 0, 1, 1, 1, 2])))
    torch.testing.assert_close(GlobalCom2().shares(tokens), torch.tensor([1.0, 1.2311, 0.7689]), atol=1e-4, rtol=0)
    assert crops.enlarged(layout, torch.tensor([10.0, 0, 1, 1, 1, 2])).tolist() == [10, 0, 10, 7.5, 2.5, 0]
    assert kept(decide(GlobalCom2(), tokens, 3)) == [0, 2, 4]
    assert kept(decide(GlobalCom2(), tokens, 4)) == [0, 2, 3, 4]


def naive(tokens: fewer.Tokens, layout: Layout, logits: list[float], keep: int, rows: int, columns: int) -> list[int]:
    """Crop by crop, number by number, for square crops without padding."""
    side = layout.grids[0][0]
    thumb = {(int(layout.y[i]), int(layout.x[i])): logits[i] for i in range(side * side)}
    sums = [0.0] * (rows * columns)
    for (y, x), value in thumb.items():
        sums[y * rows // side * columns + x * columns // side] += value
    soft = torch.tensor(sums).div(10).softmax(0)
    shares = [1.0, *(1 + soft - soft.mean()).tolist()]
    counts = fewer.Budget.split(keep, [share * side * side for share in shares], [side * side] * len(shares))

    def at(y: float, x: float) -> float:
        y, x = min(max(y, 0), side - 1), min(max(x, 0), side - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, side - 1), min(x0 + 1, side - 1)
        upper = thumb[y0, x0] * (1 - x + x0) + thumb[y0, x1] * (x - x0)
        lower = thumb[y1, x0] * (1 - x + x0) + thumb[y1, x1] * (x - x0)
        return upper * (1 - y + y0) + lower * (y - y0)

    chosen = sorted(range(side * side), key=lambda i: -logits[i])[: counts[0]]
    for crop in range(rows * columns):
        mine = [i for i in range(len(logits)) if int(layout.crop[i]) == crop + 1]
        wide = []
        for i in mine:
            gy = crop // columns * side + int(layout.y[i])
            gx = crop % columns * side + int(layout.x[i])
            wide.append(at((gy + 0.5) / rows - 0.5, (gx + 0.5) / columns - 0.5))
        own = [logits[i] for i in mine]
        lengths = [sum(v * v for v in values) ** 0.5 for values in (own, wide)]
        total = {i: a / lengths[0] + g / lengths[1] for i, a, g in zip(mine, own, wide, strict=True)}
        chosen += sorted(mine, key=lambda i: -total[i])[: counts[crop + 1]]
    return sorted(chosen)


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("keep", [1, 10, 40])
def test_agrees_with_plain_python(rows: int, columns: int, keep: int) -> None:
    layout = cut_up(rows, columns, 6)
    logits = random(len(layout), seed=rows) * 3
    tokens = place(len(layout), layout=layout, tower=says(logits))
    assert kept(decide(GlobalCom2(), tokens, keep)) == naive(tokens, layout, logits.tolist(), keep, rows, columns)


def test_scores_and_shares_are_the_authors() -> None:
    """Made with the authors' functions (GlobalCom2, llava/model/llava_arch.py, 96b2d00) for a thumbnail and crops of 6
    by 6, of which 2 rows at the top and at the bottom are padding, and logits of `view(132, seed=5)`: the scales of
    their `generate_scale_for_crop_features` at 0.25, and the choice of their `select_topk_crop_features` by those,
    which rounds down to 5, 6, 6 and 5 tokens. Two crops have a token more here: what is left to make up the total."""
    layout = cut_up(2, 2, 6, pad=2)
    tokens = place(len(layout), layout=layout, tower=view(len(layout), seed=5))
    expected = torch.tensor([0.24013, 0.26528, 0.25676, 0.23784])
    torch.testing.assert_close(GlobalCom2().shares(tokens)[1:] * 0.25, expected, atol=1e-5, rtol=0)
    found = kept(decide(GlobalCom2(), tokens, 33))
    assert [int((layout.crop[found] == crop).sum()) for crop in range(5)] == [9, 6, 6, 6, 6]
    second = [62, 70, 71, 73, 78, 79]
    third = [84, 85, 86, 90, 91, 92]
    assert [i for i in found if int(layout.crop[i]) == 2] == second
    assert [i for i in found if int(layout.crop[i]) == 3] == third


def test_a_picture_that_was_not_cut_up() -> None:
    layout = lay([(4, 4)], (0,))
    logits = random(16)
    found = kept(decide(GlobalCom2(), place(16, layout=layout, tower=says(logits)), 5))
    assert found == logits.topk(5).indices.sort().values.tolist()


def test_several_pictures_at_once() -> None:
    """Every picture's crops are compared among themselves, by their own thumbnail."""
    layout = cut_up(2, 2, 4)
    logits = random(len(layout))
    one = place(len(layout), layout=layout, tower=says(logits))
    two = place(2 * len(layout), layout=Layout.join([layout, layout]), tower=says(logits.repeat(2)))
    torch.testing.assert_close(GlobalCom2().shares(two), GlobalCom2().shares(one).repeat(2))
    torch.testing.assert_close(GlobalCom2().score(two), GlobalCom2().score(one).repeat(1, 2))


@pytest.mark.parametrize("keep", [1, 2, 13, 79])
def test_counts_add_up_with_empty_crops(keep: int) -> None:
    layout = cut_up(2, 2, 4)
    layout = layout.take(layout.crop != 2)  # a crop of nothing but padding
    assert len(kept(decide(GlobalCom2(), place(64, layout=layout, tower=True), min(keep, 63)))) == min(keep, 63)


def test_what_it_must_know() -> None:
    layout = cut_up(2, 2, 4)
    blind = replace(layout, regions=None)
    with pytest.raises(MissingSignal, match="where crops lie"):
        decide(GlobalCom2(), place(len(blind), layout=blind, tower=True), 9)
    headless = replace(layout, whole=())
    with pytest.raises(MissingSignal, match="whole of every picture"):
        decide(GlobalCom2(), place(len(layout), layout=headless, tower=True), 9)
    with pytest.raises(FewerError, match=r"temperature=0\.0"):
        GlobalCom2(temperature=0.0)


@pytest.mark.parametrize(
    ("name", "by"),
    [("llava", "class"), ("llava_next", "class"), ("llava_onevision", "received"), ("qwen2_vl", "received")],
)
@pytest.mark.parametrize("per", ["picture", "prompt"])
def test_in_a_model(name: str, by: By, per: str) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, GlobalCom2(by=by), keep=0.4, per=per) as run:
        case.model(**inputs)
    assert len(run.plan) == (3 if per == "picture" else 2)


def test_a_model_that_does_not_say_where_crops_lie() -> None:
    case = FAMILIES["internvl"]()
    inputs = case.inputs([1])
    with pytest.raises(MissingSignal, match="where crops lie"), fewer.compress(case.model, GlobalCom2(), keep=0.4):
        case.model(**inputs)
