"""Give up the worst tokens in two ways: the tail is dropped, what comes before the tail is merged into the head.

prune_and_merge   the plan
masked            the same decision for learning how long the parts are: everyone stays, and the mass of a token that
                  is gone is next to nothing, with a gradient to the rates
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.reduce.fold import closed, masses, weighed
from fewer.reduce.select import top_k
from fewer.types import Allocation, Plan, Tokens, Transform

GONE = 1e-6
"""Mass of a token that is gone while rates are learned: its share in attention, beside a token of mass one."""


class Nearest(NamedTuple):
    """For each token that goes: whether there is anyone to join, who is most like it, and the cosine, 0 at least."""

    joins: Bool[Tensor, "b n"]
    partner: Int[Tensor, "b n"]
    cosine: Float[Tensor, "b n"]


def nearest(features: Float[Tensor, "b n d"], going: Bool[Tensor, "b n"], there: Bool[Tensor, "b n"]) -> Nearest:
    """The best among those that are `there` for each that is `going`, by cosine of features."""
    n, unit = going.shape[1], F.normalize(features.float(), dim=-1)
    these, those = Plan.keep(going).survivors, Plan.keep(there).survivors
    spare = torch.arange(n + 1, device=going.device).repeat(len(going), 1)  # its last column takes what is not there
    none = torch.zeros(spare.shape, device=going.device)
    if not those.shape[-1] or not these.shape[-1]:
        return Nearest(torch.zeros_like(going), spare[:, :-1], none[:, :-1])

    def picked(index: Tensor) -> Tensor:
        return unit.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, unit.shape[-1]))

    alike = (picked(these) @ picked(those).mT).masked_fill((those < 0).unsqueeze(1), -torch.inf)
    best = alike.max(-1)
    at = torch.where((these < 0) | best.values.isneginf(), n, these)
    partner = spare.scatter(-1, at, those.gather(-1, best.indices))[:, :-1]
    cosine = none.scatter(-1, at, best.values.clamp(0, 1))[:, :-1]
    return Nearest(partner != spare[:, :-1], partner, cosine)


def prune_and_merge(
    tokens: Tokens, scores: Float[Tensor, "b n"], allocation: Allocation, between: Int[Tensor, " b"]
) -> Plan:
    """Keep the `counts` best; those after them, down to `between`, join the survivor most like them; the rest go.

    Slots are plain means. A token that joins adds its mass times the cosine, so that a poor match counts less.
    """
    kept = top_k(scores, allocation)
    going = (top_k(scores, Allocation(between)).slot >= 0) & (kept.slot < 0)
    found = nearest(tokens.features, going, (kept.slot >= 0) & ~closed(tokens))
    slot = torch.where(found.joins, kept.slot.gather(-1, found.partner), kept.slot)
    plan = weighed(tokens, replace(kept, slot=slot), torch.ones_like(kept.weight))
    counts = masses(tokens) * torch.where(found.joins, found.cosine, kept.weight)
    mass = counts.new_zeros(kept.survivors.shape).scatter_add(-1, slot.clamp(min=0), counts)
    return replace(plan, mass=mass)


def masked(
    tokens: Tokens,
    scores: Float[Tensor, "b n"],
    prune: Tensor,
    merge: Tensor,
    stays: tuple[Float[Tensor, " patches"], Float[Tensor, " patches"]],
) -> Transform:
    """The same on tokens without padding, and nobody leaves: what is gone has the mass `GONE` from then on.

    Args:
        prune: patches that are left by pruning; only its value is read, and that of `merge`.
        merge: patches that are left by merging.
        stays: for each of the two, how likely the patch of each rank is left; masses pass their gradients on to it.
    """
    mass, beside = masses(tokens), tokens.site.prefix
    there = mass.detach() > 0.5
    b, n = there.shape
    came = int(there[0].sum()) - beside
    pruned = min(came, int(prune))
    merged = min(pruned, int(merge))
    # the order of top_k: of two equal tokens the later one is better
    worth = torch.where(there, scores.detach(), -torch.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = (n - 1 - worth).argsort(-1) - beside
    going = (rank >= merged) & (rank < pruned)
    found = nearest(tokens.features.detach(), going, (rank < merged) & ~tokens.protected)
    index = torch.arange(n, device=rank.device)
    into = torch.where(found.joins, found.partner, index)
    matrix = F.one_hot(into, n).mT.float() + torch.diag_embed(found.joins.float())  # who joins also stays, unseen
    taken = mass.scatter_add(-1, found.partner, torch.where(found.joins, mass * found.cosine, 0))
    for left, likely, out_of in ((pruned, stays[0], came), (merged, stays[1], pruned)):
        if left < out_of:
            chance = F.pad(likely, (beside, n - beside - len(likely)), value=1.0)[rank + beside]
            hard = (rank < left).float()
            through = hard + chance - chance.detach()
            taken = torch.where((rank >= 0) & (rank < out_of), taken * through + GONE * (1 - hard), taken)
    return Transform(matrix / matrix.sum(-1, keepdim=True), index.expand(b, n), taken)
