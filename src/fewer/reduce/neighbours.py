"""Merge neighbours: square windows of each crop whose tokens are alike become one token each."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.signals.visual import Layout
from fewer.types import Plan


def merge_windows(x: Float[Tensor, "1 n d"], layout: Layout, side: int, keep: int) -> Plan:
    """Leave `keep` tokens. Windows give up theirs in the order of the mean cosine between their tokens, into their last
    token, as a mean; the window with which the count is met gives up those most like its last. Where windows of that
    side are more than may stay, they are larger."""
    n = x.shape[1]
    unit, index = F.normalize(x[0].float(), dim=-1), torch.arange(n, device=x.device)
    inside = windows(layout, side, keep)
    size = torch.bincount(inside)
    alike = torch.zeros(len(size), unit.shape[1], device=x.device).index_add_(0, inside, unit).square().sum(-1)
    alike = ((alike - size) / (size * (size - 1))).masked_fill(size < 2, -torch.inf)
    first = alike.argsort(descending=True, stable=True)
    spare = (size - 1)[first]
    gives = torch.empty_like(size)
    gives[first] = (n - keep - (spare.cumsum(0) - spare)).clamp(min=0).minimum(spare)  # tokens that each loses
    last = torch.zeros_like(size).scatter_reduce_(0, inside, index, "amax")[inside]
    near = (unit * unit[last]).sum(-1).masked_fill(index == last, torch.inf)
    order = near.argsort(descending=True, stable=True)
    order = order[inside[order].argsort(stable=True)]  # window by window, most like its last token first
    rank = torch.empty_like(order)
    rank[order] = index - (size.cumsum(0) - size)[inside[order]]
    joins = rank <= gives[inside]  # the last token of each window among them
    stays = (index == last) | ~joins
    slot = stays.cumsum(0) - 1
    slot = torch.where(stays, slot, slot[last])
    weight = torch.where(joins, 1 / (gives + 1).float()[inside], 1)
    return Plan(slot.unsqueeze(0), weight.unsqueeze(0), index[stays].unsqueeze(0))


def windows(layout: Layout, side: int, most: int) -> Int[Tensor, " n"]:
    """The window that each token lies in, in windows of that side, or of the least greater one that makes no more than
    `most` of them; one for all tokens where even whole crops are more."""
    for wide in range(side, max(max(grid) for grid in layout.grids) + 1):
        at = torch.stack([layout.crop, layout.y // wide, layout.x // wide])
        inside: Tensor = torch.unique(at, dim=1, return_inverse=True)[1]
        if int(inside.max()) < most:
            return inside
    return torch.zeros_like(layout.crop)
