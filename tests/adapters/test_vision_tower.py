"""What is read of a vision tower while it runs is what it would hand out under eager attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.signals.visual import Layout, Places, Tower, TowerView
from fewer.types import MissingSignal
from tests import vlms


class Watching:
    """Keeps everything it is shown, and drops one token so that it is asked."""

    def __init__(self, *needs: Any) -> None:
        self.needs = frozenset({Places(), *needs})
        self.shown: list[fewer.Tokens] = []

    def score(self, tokens: fewer.Tokens) -> Tensor:
        self.shown.append(tokens)
        return torch.arange(tokens.positions.shape[-1]).float().unsqueeze(0)

    def allocate(self, tokens: fewer.Tokens, scores: Tensor, budget: fewer.Budget) -> fewer.Allocation:
        return fewer.Allocation(torch.tensor([budget.count(int(tokens.seen[0]))]))

    def reduce(self, tokens: fewer.Tokens, scores: Tensor, allocation: fewer.Allocation) -> fewer.Plan:
        return fewer.Plan.of(scores.topk(int(allocation.counts)).indices.sort().values, scores.shape[-1])


def attention_of(case: vlms.Case, inputs: dict[str, Tensor], layer: int) -> list[Tensor]:
    """Every image's map `(heads, n, n)`, as eager attention hands it to the tower's own layer."""
    model = case.model
    tower = getattr(model.base_model, "vision_tower", None) or getattr(model.base_model, "visual", None)
    tower = model.base_model.vision_model if tower is None else tower
    before = tower.config._attn_implementation
    maps: list[Tensor] = []
    blocks = max((m for m in tower.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    owner = next(m for m in blocks[layer].modules() if type(m).__name__.endswith("Attention"))
    module: Any = __import__(type(owner).__module__, fromlist=["eager_attention_forward"])
    own = module.eager_attention_forward

    def shown(asked: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(asked, *args, **kwargs)
        if asked is owner:
            maps.extend(out[1])
        return out

    configs = [m.config for m in tower.modules() if hasattr(m, "config")]
    module.eager_attention_forward = shown
    for config in configs:
        config._attn_implementation = "eager"
    try:
        model(**inputs)
    finally:
        module.eager_attention_forward = own
        for config in configs:
            config._attn_implementation = before
    return maps


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_the_class_row(backend: str) -> None:
    case = vlms.llava()
    case.model.base_model.vision_tower.set_attn_implementation(backend)
    inputs = case.inputs([2, 1])
    maps = attention_of(case, inputs, 1)  # of 3 layers, the one before the last gives the features
    method = Watching(Tower())
    with fewer.compress(case.model, method, keep=0.9):
        case.model(**inputs)
    assert len(method.shown) == len(maps) == 3
    for tokens, full in zip(method.shown, maps, strict=True):
        torch.testing.assert_close(tokens.signal(Tower, TowerView).attention, full[:, 0, 1:], atol=1e-6, rtol=1e-5)
        assert case.model.base_model.vision_tower.config._attn_implementation == backend


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_received_where_four_patches_make_a_token(family: str) -> None:
    case = vlms.FAMILIES[family]()
    inputs = case.inputs([1])
    (full,) = attention_of(case, inputs, -1)
    method = Watching(Tower(by="received"))
    with fewer.compress(case.model, method, keep=0.9):
        case.model(**inputs)
    expected = full.mean(1).view(len(full), -1, 4).mean(2)
    torch.testing.assert_close(method.shown[0].signal(Tower, TowerView).attention, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_windows_are_put_back_in_order() -> None:
    case = vlms.qwen2_5_vl()
    inputs = case.inputs([1])
    grid = inputs["image_grid_thw"]
    tower = case.model.base_model.visual
    if hasattr(tower, "get_window_index"):
        order = torch.as_tensor(tower.get_window_index(grid)[0])
    else:
        from transformers.vision_utils import get_vision_window_index

        order, _ = get_vision_window_index(grid, 2, 16, 4)
    assert order.tolist() != sorted(order.tolist()), "or the test shows nothing"
    (full,) = attention_of(case, inputs, 1)
    method = Watching(Tower(by="received"))
    with fewer.compress(case.model, method, keep=0.9):
        case.model(**inputs)
    windowed = full.mean(1).view(len(full), -1, 4).mean(2)
    expected = torch.empty_like(windowed)
    expected[:, order] = windowed
    torch.testing.assert_close(method.shown[0].signal(Tower, TowerView).attention, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_pixel_shuffled_patches_are_averaged() -> None:
    case = vlms.internvl()
    inputs = case.inputs([1])
    maps = attention_of(case, inputs, -1)
    method = Watching(Tower())
    with fewer.compress(case.model, method, keep=0.9):
        case.model(**inputs)
    expected = []
    for full in maps:  # 1 + 36 patches of a 6 x 6 grid, 3 x 3 tokens
        rows = full[:, 0, 1:].view(-1, 3, 2, 3, 2)
        expected.append(rows.mean((2, 4)).flatten(1))
    got = method.shown[0].signal(Tower, TowerView).attention
    torch.testing.assert_close(got, torch.cat(expected, 1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "smolvlm"])
def test_no_class_token_is_said(family: str) -> None:
    case = vlms.FAMILIES[family]()
    with pytest.raises(MissingSignal, match="by='received'"), fewer.compress(case.model, Watching(Tower()), keep=0.5):
        case.model(**case.inputs([1]))


@torch.no_grad()
def test_packed_coordinates_are_those_of_the_picture() -> None:
    """A picture whose pixels say where they are: the tower's patches then tell their own place."""
    case = vlms.llava_next()
    inputs = case.inputs([1])
    method = Watching()
    with fewer.compress(case.model, method, keep=0.9) as run:
        case.model(**inputs)
    layout = method.shown[0].signal(Places, Layout)
    assert layout.grids == ((6, 6),) * 3 and layout.whole == (0,)
    first = [(c, y, x) for c, y, x in zip(layout.crop.tolist(), layout.y.tolist(), layout.x.tolist(), strict=True)]
    assert first[:36] == [(0, y, x) for y in range(6) for x in range(6)]
    tiled = first[36:]  # 40 x 20 pixels: two crops, one above the other
    assert tiled == [(1 + y // 6, y % 6, x) for y in range(12) for x in range(6)]
    assert len(run.pictures[0][0].separators) == 12
    assert layout.regions is not None and layout.regions[1:].tolist() == [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]


@torch.no_grad()
def test_tiles_of_a_picture_are_one_picture() -> None:
    case = vlms.smolvlm()
    method = Watching()
    with fewer.compress(case.model, method, keep=0.5) as run:
        case.model(**case.inputs([2, 1]))
    assert [[len(one.layout) for one in row] for row in run.pictures] == [[27, 9], [27]]
    assert method.shown[0].signal(Places, Layout).whole == (2,), "the last tile shows all of it"
