"""What the picture as a whole says of its crops: a model that cuts pictures up also sees them whole, and small."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.errors import MissingSignal
from fewer.signals.visual import Layout


def pictures(layout: Layout) -> Int[Tensor, " c"]:
    """The picture of every crop; of crops without a token that of the one before."""
    none = torch.zeros(len(layout.grids), dtype=torch.long, device=layout.crop.device)
    return none.scatter_reduce(0, layout.crop, layout.picture, "amax").cummax(0).values


def places(layout: Layout, who: str) -> tuple[Float[Tensor, "c 4"], Int[Tensor, " c"], list[int]]:
    """Every crop's region and picture, and the crops that show a picture whole; `who` asks for them."""
    picture = pictures(layout)
    if sorted(picture[list(layout.whole)].tolist()) != sorted(set(picture.tolist())):
        raise MissingSignal(f"{who} needs the whole of every picture in one crop, and these have no such (or several)")
    if layout.regions is None and len(layout.whole) < len(layout.grids):
        raise MissingSignal(
            f"{who} needs to know where crops lie in their picture, which this model does not say; LLaVA-NeXT and "
            "LLaVA-OneVision do"
        )
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=layout.crop.device).expand(len(layout.grids), 4)
    return (whole if layout.regions is None else layout.regions), picture, list(layout.whole)


def summed(layout: Layout, values: Float[Tensor, " n"], who: str = "this method") -> Float[Tensor, " c"]:
    """For each crop, the sum of the thumbnail's values where it lies; of thumbnails, of all of their own."""
    regions, picture, wholes = places(layout, who)
    sums = values.new_zeros(len(layout.grids))
    for whole in wholes:
        mine, (h, w) = layout.crop == whole, layout.grids[whole]
        y, x = (layout.y[mine] + 0.5) / h, (layout.x[mine] + 0.5) / w
        top, left, bottom, right = regions.unsqueeze(-1).unbind(1)  # (c, 1)
        inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
        here = (inside * values[mine]).sum(-1)
        sums = torch.where(picture == picture[whole], here, sums)
    return sums


def enlarged(layout: Layout, values: Float[Tensor, " n"], who: str = "this method") -> Float[Tensor, " n"]:
    """The thumbnail's values at the places of the crops' tokens, between its own by linear interpolation. It shows what
    all the crops of its picture show together, without their padding. Thumbnails keep their own."""
    regions, picture, wholes = places(layout, who)
    out = values.clone()
    for whole in wholes:
        mine, grid = layout.crop == whole, layout.grids[whole]
        there = (picture == picture[whole])[layout.crop] & ~mine
        if not bool(there.any()) or not bool(mine.any()):
            continue
        small = values[mine].mean().repeat(grid[0] * grid[1])
        small[layout.y[mine] * grid[1] + layout.x[mine]] = values[mine]
        region, crop = regions[layout.crop[there]], layout.crop[there]
        tall, wide = torch.tensor(layout.grids, device=values.device)[crop].unbind(1)
        y = (region[:, 0] * tall / (region[:, 2] - region[:, 0])).round().long() + layout.y[there]
        x = (region[:, 1] * wide / (region[:, 3] - region[:, 1])).round().long() + layout.x[there]
        y, x = y - y.min(), x - x.min()
        size = [int(y.max()) + 1, int(x.max()) + 1]
        out[there] = F.interpolate(small.view(1, 1, *grid), size=size, mode="bilinear")[0, 0][y, x]
    return out


def unit(values: Float[Tensor, " n"], group: Int[Tensor, " n"], groups: int) -> Float[Tensor, " n"]:
    """Each group's values as a vector of length one."""
    norm = values.new_zeros(groups).index_add(0, group, values.square()).sqrt()
    return values / norm.clamp(min=1e-12)[group]
