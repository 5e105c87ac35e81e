"""Merge what is dropped into what is kept, by likeness of keys. The same targets and weights serve keys and values.

Keys are stored rotated, each at its own position, and are averaged as they are stored: no one turns them back first.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.attention import BLOCK_CELLS
from fewer.signals import blank
from fewer.types import Plan, Tokens


@dataclass(frozen=True)
class Nearest:
    """For each token the slot whose survivor's key is most like its own, -1 for none, and their cosine."""

    slot: Int[Tensor, "*lead n"]
    cosine: Float[Tensor, "*lead n"]


def nearest(tokens: Tokens, plan: Plan, asking: Bool[Tensor, "*lead n"]) -> Nearest:
    """The most similar survivor of each asking token, at its own head. Protected ones take no one in: they may be held
    packed. Ties go to the earlier survivor."""
    unit = F.normalize(blank(tokens.features, tokens.padding).float(), dim=-1)  # (b, h, n, d)
    closed = (plan.survivors < 0) | tokens.protected.gather(-1, plan.survivors.clamp(min=0))
    kept, who = plan.pick(unit).transpose(-1, -2), Plan.keep(asking).survivors  # (b, h, d, k), (b, h, asking)
    n, k = unit.shape[-2], closed.shape[-1]
    slot = asking.new_full(
        (*asking.shape[:-1], n + 1), -1, dtype=torch.long
    )  # heads that ask less use the spare column
    cosine = unit.new_full(slot.shape, -torch.inf)
    for some in torch.split(who, max(1, BLOCK_CELLS // max(1, tokens.available.numel() * k)), dim=-1) if k else ():
        wide = some.clamp(min=0).unsqueeze(-1).expand(*some.shape, unit.shape[-1])
        best = (unit.gather(-2, wide) @ kept).masked_fill(closed.unsqueeze(-2), -torch.inf).max(-1)
        at = torch.where(some < 0, n, some)
        slot.scatter_(-1, at, torch.where(best.values.isinf(), -1, best.indices))
        cosine.scatter_(-1, at, best.values)
    return Nearest(slot[..., :n], cosine[..., :n])


def absorb(plan: Plan, slot: Int[Tensor, "*lead n"], weight: Float[Tensor, "*lead n"], pull: float = 0.0) -> Plan:
    """The plan with dropped tokens folded into slots: what a slot held counts 1, and each token that joins it adds
    `weight` of itself and `pull` of what was there; all divided by their sum.

    `slot` is -1 for tokens that do not join.
    """
    joins, spare = slot >= 0, plan.survivors.shape[-1]
    weight = torch.where(joins, weight, 0.0)
    into = torch.where(joins, slot, spare)
    zeros = weight.new_zeros(*slot.shape[:-1], spare + 1)
    own = 1 + zeros.scatter_add(-1, into, joins * pull)
    total = own + zeros.scatter_add(-1, into, weight)
    home = torch.where(joins, slot, torch.where(plan.slot < 0, spare, plan.slot))
    share = torch.where(joins, weight, plan.weight * own.gather(-1, home)) / total.gather(-1, home)
    return replace(plan, slot=torch.where(joins, slot, plan.slot), weight=share)
