"""Who says again what another token says: half of the tokens, rated by how much each is like any of the other half."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.reduce.fold import closed
from fewer.reduce.select import top_k
from fewer.types import Allocation, Tokens

GROUPS = ("sequential", "alternate")


def lower_group(tokens: Tokens, scores: Float[Tensor, "b n"], groups: str) -> Bool[Tensor, "b n"]:
    """The less important of two groups of tokens, the smaller one if their number is odd: the lower half by score
    ("sequential"), or every second of them in the order of scores ("alternate"). Of equal scores the later token is up.
    """
    n = scores.shape[-1]
    open_ = ~closed(tokens)
    order = n - 1 - scores.masked_fill(~open_, -torch.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    half = (open_.sum(-1, keepdim=True) + 1) // 2
    return open_ & (rank >= half if groups == "sequential" else rank % 2 == 1)


def repeating(
    tokens: Tokens, lower: Bool[Tensor, "b n"], metric: Float[Tensor, "b n d"], leaving: Int[Tensor, " b"]
) -> Bool[Tensor, "b n"]:
    """Of the `lower` tokens, the `leaving` that are most like one of the others, by cosine of `metric`."""
    upper = ~closed(tokens) & ~lower
    unit = F.normalize(metric.float(), dim=-1)
    alike = (unit @ unit.transpose(-1, -2)).masked_fill(~upper.unsqueeze(-2), -torch.inf).amax(-1)
    return top_k(alike.masked_fill(~lower, -torch.inf), Allocation(leaving)).slot >= 0
