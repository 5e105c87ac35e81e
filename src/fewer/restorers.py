"""Stage 4: back to the original length, or say that it cannot be.

copy     every token takes its slot's features; dropped tokens get zeros. Exact inverse of a size-weighted mean in
         the size-weighted sense: applying the plan again gives the slots back.
zero     only survivors get features, everything else zeros.
pinv     the pseudo-inverse of the plan's matrix: of all that the plan could have come from, the smallest.
delta    every token keeps what it was and adds what its slot has gained since; dropped tokens stay as they were.
stale    survivors get features, everything else stays as it was.
kernel   every token is a mixture of the 20 slots it was nearest to, by exp(-0.01 x squared distance), weights adding up
         to one (Expedit); class and register tokens take from nobody else, and give to nobody.

The last three need `base`, the features that the plan was made on.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.errors import FewerError, UnknownName
from fewer.plan import Plan, Reduction, Transform

NEAREST, TEMPERATURE = 20, 0.01
"""Expedit's defaults: so many slots, and the factor on squared distances between features as they are."""


def copy(plan: Reduction, y: Float[Tensor, "*lead k d"]) -> Float[Tensor, "*lead n d"]:
    if isinstance(plan, Transform):  # the same association, read the other way round; rows sum to one
        taken = plan.matrix if plan.mass is None else plan.matrix * plan.mass.unsqueeze(-1)
        share = taken / taken.sum(-2, keepdim=True).abs().clamp(min=torch.finfo(torch.float32).tiny)
        spread: Tensor = share.transpose(-1, -2) @ y.float()
        return spread.to(y.dtype)
    kept = (plan.slot >= 0).unsqueeze(-1)
    if not y.shape[-2]:  # nothing was kept, and gathering from nothing is an error
        return y.new_zeros(*plan.slot.shape, y.shape[-1])
    index = plan.slot.clamp(min=0).unsqueeze(-1).expand(*plan.slot.shape, y.shape[-1])
    return torch.where(kept, y.gather(-2, index), 0)


def zero(plan: Reduction, y: Float[Tensor, "*lead k d"]) -> Float[Tensor, "*lead n d"]:
    return _placed(plan, y, y.new_zeros(*plan.assign.shape, y.shape[-1]))


def pinv(plan: Reduction, y: Float[Tensor, "*lead k d"]) -> Float[Tensor, "*lead n d"]:
    if isinstance(plan, Transform):
        back: Tensor = torch.linalg.pinv(plan.matrix) @ y.float()
        return back.to(y.dtype)
    into, there = plan.slot.clamp(min=0), plan.slot >= 0  # rows of the matrix do not overlap, so each inverts alone
    square = plan.weight.new_zeros(plan.survivors.shape).scatter_add(-1, into, plan.weight.square() * there)
    back = torch.where(there, plan.weight / square.gather(-1, into).clamp(min=torch.finfo(torch.float32).tiny), 0)
    return (copy(plan, y).float() * back.unsqueeze(-1)).to(y.dtype)


def delta(plan: Reduction, y: Float[Tensor, "*lead k d"], base: Tensor) -> Float[Tensor, "*lead n d"]:
    return base + copy(plan, y - plan.apply(base))


def stale(plan: Reduction, y: Float[Tensor, "*lead k d"], base: Tensor) -> Float[Tensor, "*lead n d"]:
    return _placed(plan, y, base)


def kernel(plan: Reduction, y: Float[Tensor, "*lead k d"], base: Tensor, prefix: int = 0) -> Float[Tensor, "*lead n d"]:
    apart = torch.cdist(base.float(), plan.apply(base).float()).square()  # (*lead, n, k)
    apart = apart.masked_fill((plan.survivors < 0).unsqueeze(-2), torch.inf)
    if prefix:  # they survive alone, in the first slots
        own = torch.eye(*apart.shape[-2:], dtype=torch.bool, device=apart.device)
        apart[..., prefix:, :prefix] = torch.inf
        apart[..., :prefix, :] = torch.where(own[:prefix], 0, torch.inf)
    near = apart.topk(min(NEAREST, apart.shape[-1]), dim=-1, largest=False)
    weights = torch.zeros_like(apart).scatter(-1, near.indices, (-TEMPERATURE * near.values).softmax(-1))
    return (weights @ y.float()).to(y.dtype)


def _placed(plan: Reduction, y: Tensor, under: Tensor) -> Tensor:
    """Slots' features at their survivors, and what is `under` everywhere else."""
    spare = torch.cat([under, under[..., :1, :]], -2)  # slots that do not exist go to a last row that is cut off
    index = torch.where(plan.survivors < 0, under.shape[-2], plan.survivors)
    return spare.scatter(-2, index.unsqueeze(-1).expand_as(y), y)[..., :-1, :]


_ALONE: dict[str, Callable[[Reduction, Tensor], Tensor]] = {"copy": copy, "zero": zero, "pinv": pinv}
_ON_BASE: dict[str, Callable[[Reduction, Tensor, Tensor, int], Tensor]] = {
    "delta": lambda plan, y, base, prefix: delta(plan, y, base),
    "stale": lambda plan, y, base, prefix: stale(plan, y, base),
    "kernel": kernel,
}
RESTORERS = (*_ALONE, *_ON_BASE)
NEEDS_BASE = tuple(_ON_BASE)


def restore(
    plan: Reduction, y: Float[Tensor, "*lead k d"], how: str = "copy", base: Tensor | None = None, prefix: int = 0
) -> Float[Tensor, "*lead n d"]:
    """Spread the slots' features back over the original tokens, by a way named in `RESTORERS`.

    Args:
        base: the features `(*lead, n, d)` that the plan was made on, for the ways that need them.
        prefix: how many of the first tokens are class and register tokens, which "kernel" does not mix with others.
    """
    if how in _ALONE:
        return _ALONE[how](plan, y)
    if how not in _ON_BASE:
        raise UnknownName(f"restore(how={how!r}): known ways are {', '.join(RESTORERS)}")
    if base is None:
        raise FewerError(
            f"restore(how={how!r}) needs the features the plan was made on: compress(..., tape=True) keeps them"
        )
    if base.shape[-1] != y.shape[-1]:
        raise FewerError(
            f"restore(how={how!r}) mixes what is restored, {y.shape[-1]} wide, with the encoder's own features, "
            f"{base.shape[-1]} wide: restore features of the encoder, or restore by 'copy', 'zero' or 'pinv'"
        )
    return _ON_BASE[how](plan, y, base, prefix)


__all__ = ["NEEDS_BASE", "RESTORERS", "Plan", "restore"]
