"""Stage 4: back to the original length, or say that it cannot be.

copy   every token takes its slot's features; dropped tokens get zeros. Exact inverse of a size-weighted mean in
       the size-weighted sense: applying the plan again gives the slots back.
zero   only survivors get features, everything else zeros.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.types import Plan, UnknownName


def copy(plan: Plan, y: Float[Tensor, "*lead k d"]) -> Float[Tensor, "*lead n d"]:
    kept = (plan.slot >= 0).unsqueeze(-1)
    if not y.shape[-2]:  # nothing was kept, and gathering from nothing is an error
        return y.new_zeros(*plan.slot.shape, y.shape[-1])
    index = plan.slot.clamp(min=0).unsqueeze(-1).expand(*plan.slot.shape, y.shape[-1])
    return torch.where(kept, y.gather(-2, index), 0)


def zero(plan: Plan, y: Float[Tensor, "*lead k d"]) -> Float[Tensor, "*lead n d"]:
    out = y.new_zeros(*plan.slot.shape[:-1], plan.slot.shape[-1] + 1, y.shape[-1])
    index = torch.where(plan.survivors < 0, plan.slot.shape[-1], plan.survivors)
    out.scatter_(-2, index.unsqueeze(-1).expand_as(y), y)
    return out[..., :-1, :]


RESTORERS: dict[str, Callable[[Plan, Tensor], Tensor]] = {"copy": copy, "zero": zero}


def restore(plan: Plan, y: Float[Tensor, "*lead k d"], how: str = "copy") -> Float[Tensor, "*lead n d"]:
    """Spread the slots' features back over the original tokens, by a way named in `RESTORERS`."""
    if how not in RESTORERS:
        raise UnknownName(f"restore(how={how!r}): known ways are {', '.join(RESTORERS)}")
    return RESTORERS[how](plan, y)
