"""Means of groups of visual tokens; the group's own choice of a token gives each its place."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.types import Plan


def means(group: Int[Tensor, " n"], cost: Float[Tensor, " n"]) -> Plan:
    """Every group (0, 1, ..; -1 is none, and leaves) becomes the mean of its members, at the place of the member with
    the least `cost`, the first of several. Empty groups are no slots.

    >>> plan = means(torch.tensor([0, 0, -1, 1]), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    >>> plan.survivors.tolist(), plan.slot.tolist(), plan.weight.tolist()
    ([[1, 3]], [[0, 0, -1, 1]], [[0.5, 0.5, 0.0, 1.0]])
    """
    groups = int(group.max()) + 1
    order = cost.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]  # by group, the cheapest first
    heads = order[torch.cat([group[order][:1] >= 0, group[order].diff() > 0])]
    survivors = heads.sort().values
    place = group.new_full((groups + 1,), -1)  # the last one is that of no group
    place[group[survivors]] = torch.arange(len(survivors), device=group.device)
    sizes = torch.bincount(group[group >= 0], minlength=groups + 1).float()
    weight = torch.where(group < 0, 0, 1 / sizes[group].clamp(min=1))
    return Plan(place[group].unsqueeze(0), weight.unsqueeze(0), survivors.unsqueeze(0))
