"""One total for all heads of a layer, more to the heads whose tokens score high."""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.allocate.scopes import winners
from fewer.score.position import FORCED
from fewer.types import Allocation, Budget, FewerError, Tokens


def across_heads(tokens: Tokens, scores: Float[Tensor, "b h n"], even: Allocation, floor: float) -> Allocation:
    """Share the total of `even` among the heads of each row.

    `floor` of a head's even share is guaranteed; the rest follows how many of the layer's best scores each head holds.
    """
    b, h, _ = scores.shape
    counts, floors = torch.empty_like(even.counts), torch.empty_like(even.counts)
    for row in range(b):
        caps = tokens.available[row].tolist()
        share = int(even.counts[row].max())  # a head that an earlier compression left with less has a lower even count
        if any(count < min(share, cap) for count, cap in zip(even.counts[row].tolist(), caps, strict=True)):
            raise FewerError(
                "a budget that is to be shared among the heads of a layer was shared among them already by the method "
                "inside; use that one by itself"
            )
        total = min(share * h, sum(caps))
        won = (scores[row] >= FORCED).sum(-1)  # what must stay is no contest between heads
        if (contested := total - int(won.sum())) > 0:
            rest = torch.where(scores[row] >= FORCED, -torch.inf, scores[row])
            won = won + winners(rest, contested, "global").sum(-1)
        # splitting the rest by what was won is the published mix, floor * even + (1 - floor) * won, made exact
        base = [min(int(floor * share + 1e-9), cap) for cap in caps]
        floors[row] = torch.tensor(base)
        spread = Budget.split(
            total - sum(base),
            [float(x) for x in won.tolist()],
            [cap - low for cap, low in zip(caps, base, strict=True)],
        )
        counts[row] = torch.tensor([low + more for low, more in zip(base, spread, strict=True)])
    return Allocation(counts, floor=floors, note=even.note)
