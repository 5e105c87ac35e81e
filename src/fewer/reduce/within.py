"""Keep the best of each group, by a number of its own: crops, frames, regions; or evenly spaced ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.types import Plan


def top_within(scores: Float[Tensor, "1 n"], group: Int[Tensor, " n"], counts: Int[Tensor, " g"]) -> Plan:
    """The `counts` best of each group, in the original order of all. Ties go to the later token.

    >>> top_within(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2])).survivors
    tensor([[1, 2, 3]])
    """
    n = len(group)
    order = n - 1 - scores[0].flip(-1).argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=len(counts))
    rank = torch.arange(n, device=group.device) - (sizes.cumsum(0) - sizes)[group[order]]
    return Plan.of(order[rank < counts.to(group.device)[group[order]]].sort().values.unsqueeze(0), n)


def evenly(index: Int[Tensor, " m"], count: int) -> Int[Tensor, " count"]:
    """`count` of these, evenly spaced from the first on.

    >>> evenly(torch.tensor([2, 3, 5, 7, 11]), 3)
    tensor([2, 3, 7])
    """
    return index[torch.arange(count, device=index.device) * len(index) // count]
