"""Keep the best, drop the rest."""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.types import Allocation, Plan


def top_k(scores: Float[Tensor, "*lead n"], allocation: Allocation) -> Plan:
    """The `counts` best of each leading index, in their original order. Ties go to the later token."""
    n = scores.shape[-1]
    # sorting the reversed row stably puts the later of two equal tokens first
    order = n - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    if len(alike := set(allocation.counts.flatten().tolist())) == 1:
        return Plan.of(order[..., : alike.pop()].sort(-1).values, n)
    within = torch.arange(n, device=scores.device) < allocation.counts.unsqueeze(-1)
    return Plan.keep(torch.zeros_like(within).scatter(-1, order, within))
