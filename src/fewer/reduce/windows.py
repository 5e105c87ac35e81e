"""Windows of neighbouring patches, each of which may become one token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.reduce.fold import closed
from fewer.types import Matching, Tokens, UnsupportedModel


def windows(tokens: Tokens, metric: Tensor, size: int = 2) -> Matching:
    """Tokens of a window join its first one; they are worth minus the mean cosine between the window's members.

    The grid's last rows and columns that fill no window stay as they are, and so does a window with a protected token.
    """
    b, n, _ = metric.shape
    prefix, grid = tokens.site.prefix, tokens.site.grid
    if grid is None or n != prefix + grid[0] * grid[1]:
        raise UnsupportedModel(
            f"windows are of patches on a grid: here are {n} tokens, {prefix} of them no patches, and the grid is "
            f"{grid}; take a vision transformer, and a method that needs no grid after others have shortened it"
        )
    high, wide = grid[0] // size, grid[1] // size
    index = prefix + torch.arange(grid[0] * grid[1], device=metric.device).view(grid)
    member = index[: high * size, : wide * size].reshape(high, size, wide, size).transpose(1, 2).reshape(-1, size**2)
    unit = F.normalize(metric.float(), dim=-1)[:, member]  # (b, windows, size^2, d)
    # the cosines of all pairs add up to the squared length of the sum; the members' own come off
    pairs = unit.sum(-2).square().sum(-1) - unit.square().sum((-2, -1))
    alike = pairs / (size**2 * (size**2 - 1))
    alike = alike.masked_fill(closed(tokens)[:, member].any(-1), -torch.inf)
    value = torch.full((b, n), torch.inf, device=metric.device)
    partner = torch.arange(n, device=metric.device).repeat(b, 1)
    value[:, member[:, 1:]] = -alike.unsqueeze(-1)
    partner[:, member[:, 1:]] = member[:, :1]
    return Matching(value, partner)
