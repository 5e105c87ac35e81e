"""Farthest points: one after the other, the token that is farthest from all chosen ones (Gonzalez, 1985)."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor


def farthest(apart: Callable[[Tensor], Tensor], first: Tensor, count: int) -> Int[Tensor, " count"]:
    """`count` different tokens, in the order of the choice, of which `first` is one; `apart(j)` are all tokens'
    distances to token j. Where nothing is apart any more, what is left is taken from the front.

    >>> at = torch.tensor([0.0, 1.0, 5.0, 9.0])
    >>> farthest(lambda j: (at - at[j]).abs(), torch.tensor(0), 3).tolist()
    [0, 3, 2]
    """
    chosen = [first]
    nearest = apart(first).float()
    taken = torch.zeros_like(nearest)
    for _ in range(count - 1):
        taken[chosen[-1]] = -torch.inf
        chosen.append((nearest + taken).argmax())
        nearest = torch.minimum(nearest, apart(chosen[-1]).float())
    return torch.stack(chosen)
