"""Merge tokens of an encoder: who may join whom, and the size-weighted mean of those that did.

The size-weighted mean is the only mean that composes: merging twice is merging once over the union.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.reduce.select import top_k
from fewer.types import Allocation, FewerError, Matching, Plan, Tokens


def masses(tokens: Tokens) -> Float[Tensor, "b n"]:
    """How many originals each token stands for; one where the host does not say."""
    if tokens.mass is None:
        return torch.ones_like(tokens.positions, dtype=torch.float32)
    return tokens.mass.float()


def closed(tokens: Tokens) -> Tensor:
    """Tokens that neither join others nor take them in."""
    return tokens.protected | tokens.padding


def halves(tokens: Tokens, metric: Float[Tensor, "b n d"]) -> Matching:
    """Bipartite matching (ToMe, section 3): every even token proposes to the odd token most like it, by cosine.

    A proposer's worth is minus that cosine, so the most redundant are given up first; odd tokens always stay.
    """
    unit = F.normalize(metric.float(), dim=-1)
    alike = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)  # (b, even, odd)
    return propose(tokens, alike)


def propose(tokens: Tokens, alike: Float[Tensor, "b even odd"]) -> Matching:
    """The same for any measure of likeness between even and odd tokens."""
    shut = closed(tokens)
    value = torch.full(tokens.positions.shape, torch.inf, device=alike.device)
    partner = torch.arange(tokens.positions.shape[1], device=alike.device).repeat(len(alike), 1)
    if alike.shape[-1]:
        deaf = shut[:, None, 1::2]
        if bool(deaf.any()):  # a class token alone stands at an even place, and this is a pass over all pairs
            alike = alike.masked_fill(deaf, -torch.inf)
        best = alike.max(-1)
        value[:, ::2] = torch.where(shut[:, ::2], torch.inf, -best.values)  # +inf too where there is nobody to join
        partner[:, ::2] = 2 * best.indices + 1
    return Matching(value, partner)


def fold(tokens: Tokens, matching: Matching, allocation: Allocation) -> Plan:
    """Give up the tokens of least worth; each goes into its partner, and slots are size-weighted means."""
    return gather_in(tokens, top_k(matching.value, allocation), matching.partner, masses(tokens))


def gather_in(tokens: Tokens, plan: Plan, partner: Int[Tensor, "b n"], weight: Float[Tensor, "b n"]) -> Plan:
    """The plan with each dropped token sent to the slot of its partner, which must survive.

    Slots are means by `weight`; masses add up whatever the weights are.
    """
    slot = torch.where(plan.slot < 0, plan.slot.gather(-1, partner), plan.slot).masked_fill(tokens.padding, -1)
    if bool(((slot < 0) & ~tokens.padding).any()):
        raise FewerError("a token was to join one that is given up itself, and would be lost silently")
    return weighed(tokens, replace(plan, slot=slot), weight)


def weighed(tokens: Tokens, plan: Plan, weight: Float[Tensor, "b n"]) -> Plan:
    """The plan with its slots as means by `weight`, and the sum of its members' masses as the mass of each."""
    given = weight
    there, into = plan.slot >= 0, plan.slot.clamp(min=0)
    none, weight, mass = weight.new_zeros(plan.survivors.shape), weight * there, masses(tokens)
    total = none.scatter_add(-1, into, weight)
    share = weight / total.gather(-1, into).clamp(min=torch.finfo(weight.dtype).tiny)
    held = total if mass is given else none.scatter_add(-1, into, mass * there)
    return replace(plan, weight=share, mass=held)


def fuse_rest(tokens: Tokens, scores: Float[Tensor, "b n"], allocation: Allocation, normalised: bool) -> Plan:
    """Keep all but one of the counts, and fuse every other token into one slot more (EViT): their sum, each times its
    score, or the mean by it (`normalised`). The best of them gives the slot its place. Where all may stay, all do."""
    plan = top_k(scores, allocation)
    alone = top_k(scores, replace(allocation, counts=(allocation.counts - 1).clamp(min=0))).slot >= 0
    left_over = (plan.slot < 0) & ~tokens.padding
    host = (plan.slot >= 0) & ~alone & ~closed(tokens) & left_over.any(-1, keepdim=True)
    rest = host | (left_over & host.any(-1, keepdim=True))
    slot = torch.where(rest, (plan.slot * host).sum(-1, keepdim=True), plan.slot)
    mean = weighed(tokens, replace(plan, slot=slot), torch.where(rest, scores.float(), 1))
    return mean if normalised else replace(mean, weight=torch.where(rest, scores.float(), mean.weight))
