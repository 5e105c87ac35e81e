"""Soft merging: every token divides itself among the slots, and each slot is the mean of what it got, by size.

Where the likeness to one slot is far above all others this is hard merging into the most alike.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewer.reduce.fold import closed, masses
from fewer.types import Plan, Tokens, Transform


def mix(tokens: Tokens, plan: Plan, likeness: Float[Tensor, "b k n"]) -> Transform:
    """The slots of `plan` as mixtures: token n gives slot k the share softmax over k of `likeness[k, n]`.

    Protected tokens, and the rows in which everybody stays, keep to themselves. Masses divide as tokens do, so their
    sum is conserved. A slot that gets next to nothing is left with its survivor's features.
    """
    own = Transform.of(plan).matrix
    alone = closed(tokens) | (plan.counts == tokens.available).unsqueeze(-1)
    shut = (plan.survivors < 0) | alone.gather(-1, plan.survivors.clamp(min=0))
    share = likeness.float().masked_fill(shut.unsqueeze(-1), -torch.inf).softmax(-2)
    part = torch.where(alone.unsqueeze(-2), own, share) * masses(tokens).unsqueeze(-2)
    mass = part.sum(-1)
    starved = (mass <= torch.finfo(mass.dtype).tiny).unsqueeze(-1)
    return Transform(torch.where(starved, own, part / mass.unsqueeze(-1)), plan.survivors, mass)


def likeness(tokens: Tokens, plan: Plan) -> Float[Tensor, "b k n"]:
    """The cosine of each slot's own features and each token's, both less the mean of the row's free tokens."""
    x, free = tokens.features.float(), (~closed(tokens)).unsqueeze(-1)
    mean = (x * free).sum(-2, keepdim=True) / free.sum(-2, keepdim=True).clamp(min=1)
    unit = F.normalize(x - mean, dim=-1)
    alike: Tensor = plan.pick(unit) @ unit.transpose(-1, -2)
    return alike
