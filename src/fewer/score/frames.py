"""Frames of a video: which visual tokens show the same place at another time."""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from fewer.signals.visual import Layout
from fewer.types import FewerError


def number(layout: Layout, who: str) -> Int[Tensor, " n"]:
    """Each token's frame, counted from 0 in its video; an error for pictures, in the name of `who` asks."""
    if not layout.video:
        raise FewerError(
            f"{who} compares the frames of a video, and this is a picture (or a prompt with one): give it a video "
            "alone, or take a method for pictures such as 'divprune'"
        )
    start = layout.crop.new_full((int(layout.picture.max()) + 1,), len(layout.grids))
    start = start.scatter_reduce(0, layout.picture, layout.crop, "amin")
    return layout.crop - start[layout.picture]


def elsewhen(layout: Layout, crop: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The token at the same place in another frame, `crop[i]` for token i; -1 where it is not there any more."""
    table = torch.full((sum(h * w for h, w in layout.grids),), -1, dtype=torch.long, device=crop.device)
    table[layout.cell] = torch.arange(len(layout), device=crop.device)
    return table[replace(layout, crop=crop).cell]
