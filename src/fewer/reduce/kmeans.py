"""Clusters of tokens that point the same way, none of them empty; and clusters as slots."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.types import Plan


def by_cosine(x: Float[Tensor, "n d"], k: int, rounds: int = 20) -> Int[Tensor, " n"]:
    """k-means by cosine: the cluster (0 to k - 1) of each of n >= k tokens.

    It starts from tokens at even steps. A cluster that nobody joins takes, of those that are not the most central of
    their own cluster, the token that is least like its centre.
    """
    unit = F.normalize(x.float(), dim=-1)
    centres = unit[torch.arange(k, device=x.device) * len(x) // k]
    label = torch.full((len(x),), -1, device=x.device)
    for _ in range(rounds):
        last, label = label, _filled(unit @ centres.T)
        if torch.equal(last, label):
            break
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, label, unit), dim=-1)
    return label


def _filled(likeness: Float[Tensor, "n k"]) -> Int[Tensor, " n"]:
    best = likeness.max(-1)
    label = best.indices
    empty = (torch.bincount(label, minlength=likeness.shape[1]) == 0).nonzero().flatten()
    if not len(empty):
        return label
    middle = _first(label, best.values)
    spare = best.values.clone()
    spare[middle] = torch.inf
    label = label.clone()
    label[spare.argsort(stable=True)[: len(empty)]] = empty
    return label


def _first(label: Int[Tensor, " n"], value: Float[Tensor, " n"]) -> Int[Tensor, " g"]:
    """The token of greatest value of every group that there is, the first of equals; by group."""
    order = value.argsort(descending=True, stable=True)
    order = order[label[order].argsort(stable=True)]
    return order[torch.cat([torch.ones_like(label[:1], dtype=torch.bool), label[order].diff() > 0])]


def folded(label: Int[Tensor, " n"], weight: Float[Tensor, " n"]) -> Plan:
    """Every group (0, 1, ..; -1 leaves) as the mean of its members by `weight`, at the place of the one of most.

    >>> plan = folded(torch.tensor([0, -1, 1, 0]), torch.tensor([1.0, 1.0, 1.0, 3.0]))
    >>> plan.survivors.tolist(), plan.slot.tolist(), plan.weight.tolist()
    ([[2, 3]], [[1, -1, 0, 1]], [[0.25, 0.0, 1.0, 0.75]])
    """
    there = (label >= 0).nonzero().flatten()
    survivors = there[_first(label[there], weight[there].float())].sort().values
    place = label.new_full((int(label.max()) + 1,), -1)
    place[label[survivors]] = torch.arange(len(survivors), device=label.device)
    return means(torch.where(label >= 0, place[label.clamp(min=0)], -1), weight, survivors)


def means(slot: Int[Tensor, " n"], weight: Float[Tensor, " n"], survivors: Int[Tensor, " k"]) -> Plan:
    """The same where the slots and their survivors are known; members without weight count as good as nothing."""
    weight = torch.where(slot >= 0, weight.float().clamp(min=1e-30), 0)
    total = weight.new_zeros(len(survivors)).index_add_(0, slot.clamp(min=0), weight)
    return Plan(slot.unsqueeze(0), (weight / total[slot.clamp(min=0)]).unsqueeze(0), survivors.unsqueeze(0))
