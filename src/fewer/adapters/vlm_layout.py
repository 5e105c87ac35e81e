"""Where the visual tokens of each model family come from: their crops or frames, rows and columns.

    llava                    one picture, one grid
    llava_next, onevision    a picture as a whole, then in crops, packed into rows that end in separators
    qwen2_vl, 2_5, 3         a grid of time, rows and columns
    internvl                 tiles of one grid, the whole picture last
    smolvlm, idefics3        the same, with text between the tiles

What a model packs in its own way is not computed again: the model's own function is given coordinates to pack in the
place of features.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewer.signals.visual import Layout
from fewer.types import UnsupportedModel


@dataclass(frozen=True)
class Piece:
    """What a model encoded as one: a picture, a video, or a tile of a picture. `content` are those of its tokens that
    stand for a part of it; the others are separators."""

    layout: Layout
    content: Tensor
    crops: int
    """How many images of the tower it was made of."""
    alive: Tensor | None = None
    """Those that go on after a stage inside the tower; None for all."""

    def __len__(self) -> int:
        return len(self.content)


def plain(grids: list[tuple[int, int]], *, video: bool = False, whole: tuple[int, ...] = ()) -> Piece:
    """Crops or frames one after the other, each row by row."""
    crop, y, x = [], [], []
    for index, (h, w) in enumerate(grids):
        crop.append(torch.full((h * w,), index))
        y.append(torch.arange(h).repeat_interleave(w))
        x.append(torch.arange(w).repeat(h))
    n = sum(map(len, crop))
    layout = Layout(
        torch.zeros(n, dtype=torch.long), torch.cat(crop), torch.cat(y), torch.cat(x), tuple(grids), whole, None, video
    )
    return Piece(layout, torch.ones(n, dtype=torch.bool), len(grids))


def _square(n: int, base: Any) -> tuple[int, int]:
    side = round(n**0.5)
    if side * side != n:
        raise UnsupportedModel(
            f"{type(base).__name__} makes {n} tokens of a picture, which is no square grid; fewer cannot tell where "
            "they lie"
        )
    return side, side


def _llava(base: Any, video: bool, given: Mapping[str, Any], features: list[Tensor]) -> list[Piece]:
    return [plain([_square(len(f), base)], whole=(0,)) for f in features]


def _packed(base: Any, video: bool, given: Mapping[str, Any], features: list[Tensor]) -> list[Piece]:
    """LLaVA-NeXT and OneVision: coordinates are packed as features are, and say where each token comes from."""
    config = base.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    if video:  # frames are pooled by two, and one separator ends them all
        half = -(-side // 2)
        called = "pixel_values_videos" if "pixel_values_videos" in given else "pixel_values"  # up to 5.2
        frames = given[called].shape[1]
        pieces = []
        for _ in features:
            piece = plain([(half, half)] * frames, video=True)
            content = torch.cat([piece.content, torch.zeros(1, dtype=torch.bool)])
            pieces.append(Piece(piece.layout, content, frames))
        return pieces
    module = sys.modules[type(base).__module__]
    pieces = []
    for size in given["image_sizes"]:
        args = (size, config.image_grid_pinpoints, config.vision_config.image_size)
        crops = int(module.image_size_to_num_patches(*args))
        rows, columns = module.get_anyres_image_grid_shape(*args) if crops > 1 else (0, 0)
        at = torch.arange(side * side)
        y, x = at // side, at % side
        # as float64: where the model interpolates, the coordinates come out between the cells
        given_crops = [torch.stack([torch.zeros_like(y), y, x], -1)]
        for tile in range(crops - 1):
            down, right = tile // columns * side, tile % columns * side
            given_crops.append(torch.stack([torch.ones_like(y), y + down, x + right], -1))
        mark = torch.full((3,), -1.0, dtype=torch.float64)
        extra = {"vision_feature_select_strategy": "default"} if config.model_type == "llava_next" else {}
        coordinates = torch.stack(given_crops).double()
        packed, _ = base.pack_image_features([coordinates], size.unsqueeze(0), image_newline=mark, **extra)
        content = packed[0][:, 0] >= 0
        tiled, gy, gx = packed[0][content].round().long().unbind(-1)
        crop = torch.where(tiled == 0, 0, 1 + gy // side * max(columns, 1) + gx // side)
        regions = [(0.0, 0.0, 1.0, 1.0)] + [
            (r / rows, c / columns, (r + 1) / rows, (c + 1) / columns) for r in range(rows) for c in range(columns)
        ]
        layout = Layout(
            torch.zeros_like(crop), crop, gy % side, gx % side, ((side, side),) * crops, (0,), torch.tensor(regions)
        )
        pieces.append(Piece(layout, content, crops))
    return pieces


def _qwen(base: Any, video: bool, given: Mapping[str, Any], features: list[Tensor]) -> list[Piece]:
    merge = base.visual.spatial_merge_size
    sizes = given["video_grid_thw" if video else "image_grid_thw"].tolist()
    return [plain([(h // merge, w // merge)] * t, video=video, whole=() if video else (0,)) for t, h, w in sizes]


def _tiles(base: Any, video: bool, given: Mapping[str, Any], features: list[Tensor]) -> list[Piece]:
    return [plain([_square(len(f), base)]) for f in features]


def _scaled(base: Any, video: bool, given: Mapping[str, Any], features: list[Tensor]) -> list[Piece]:
    """SmolVLM and Idefics3: features are listed by the row of the batch, whose tiles lie one after the other."""
    config = base.config
    fold = config.vision_config.patch_size * config.scale_factor
    grid = (given["pixel_values"].shape[-2] // fold, given["pixel_values"].shape[-1] // fold)
    return [plain([grid]) for f in features for _ in range(len(f) // (grid[0] * grid[1]))]


def _each(row: Tensor, columns: Tensor, pieces: list[int]) -> list[int]:
    """Every piece is a picture of its own."""
    return [1] * len(pieces)


def _runs(row: Tensor, columns: Tensor, pieces: list[int]) -> list[int]:
    """InternVL: the tiles of a picture stand in one run of placeholders."""
    starts = torch.cat([columns[:1] >= 0, columns.diff() > 1])
    first = [0, *torch.tensor(pieces).cumsum(0).tolist()]
    counts: list[int] = []
    for i in range(len(pieces)):
        if bool(starts[first[i]]):
            counts.append(0)
        counts[-1] += 1
    return counts


def _marked(row: Tensor, columns: Tensor, pieces: list[int]) -> list[int]:
    """SmolVLM and Idefics3: the last tile of a picture shows all of it, and the token before it says so; as the row's
    last tile is such a one, that token is known."""
    first = [0, *torch.tensor(pieces).cumsum(0).tolist()][:-1]
    before = [int(row[int(columns[at]) - 1]) for at in first]
    counts, open_ = [], 0
    for mark in before:
        open_ += 1
        if mark == before[-1]:
            counts.append(open_)
            open_ = 0
    return counts


Describe = Callable[[Any, bool, Mapping[str, Any], list[Tensor]], list[Piece]]
Group = Callable[[Tensor, Tensor, list[int]], list[int]]

FAMILIES: dict[str, tuple[Describe, Group]] = {
    "llava": (_llava, _each),
    "llava_next": (_packed, _each),
    "llava_onevision": (_packed, _each),
    "qwen2_vl": (_qwen, _each),
    "qwen2_5_vl": (_qwen, _each),
    "qwen3_vl": (_qwen, _each),
    "internvl": (_tiles, _runs),
    "smolvlm": (_scaled, _marked),
    "idefics3": (_scaled, _marked),
}
"""By the `model_type` of the configuration: what was encoded, piece by piece; and how many pieces make a picture."""


def is_vlm(model: Any) -> bool:
    """Whether this is a vision-language model of a family that is known."""
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) in FAMILIES and hasattr(config, "vision_config")


def picture(pieces: list[Piece]) -> Piece:
    """Tiles as one picture; the last one shows all of it."""
    if len(pieces) == 1:
        return pieces[0]
    joined = Layout.join([piece.layout for piece in pieces])
    layout = Layout(torch.zeros_like(joined.picture), joined.crop, joined.y, joined.x, joined.grids, (len(pieces) - 1,))
    return Piece(layout, torch.cat([piece.content for piece in pieces]), sum(piece.crops for piece in pieces))
