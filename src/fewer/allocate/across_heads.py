"""One total for all heads of a layer, more to the heads whose tokens score high."""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.types import Allocation, Budget, Tokens


def across_heads(tokens: Tokens, scores: Float[Tensor, "b h n"], even: Allocation, floor: float) -> Allocation:
    """Share the total of `even` among the heads of each row.

    `floor` of a head's even share is guaranteed; the rest follows how many of the layer's best scores each head holds.
    """
    b, h, n = scores.shape
    counts = torch.empty_like(even.counts)
    for row in range(b):
        total = int(even.counts[row].sum())
        best = scores[row].flatten().argsort(descending=True, stable=True)[:total]
        won = torch.bincount(best // n, minlength=h).tolist()
        caps = tokens.available[row].tolist()
        # splitting the rest by what was won is the published mix, floor * even + (1 - floor) * won, made exact
        base = [min(int(floor * share), cap) for share, cap in zip(even.counts[row].tolist(), caps, strict=True)]
        rest = Budget.split(
            total - sum(base), [float(x) for x in won], [cap - low for cap, low in zip(caps, base, strict=True)]
        )
        counts[row] = torch.tensor([low + more for low, more in zip(base, rest, strict=True)])
    return Allocation(counts, floor=(even.counts * floor).long(), note=even.note)
