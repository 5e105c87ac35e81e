"""Scores from where a token stands."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.types import Tokens

FORCED = torch.finfo(torch.float32).max
"""What a method gives tokens that it always keeps: above every score, below +inf, which is for protected tokens."""


def latest(tokens: Tokens, count: int) -> Bool[Tensor, "*lead n"]:
    """Marks the last `count` tokens of each row."""
    cut = (tokens.seen - count).view(-1, *[1] * (tokens.positions.ndim - 1))
    return (tokens.positions >= cut) & ~tokens.padding


def must_stay(scores: Float[Tensor, "*lead n"], mask: Bool[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
    """The same scores with `FORCED` where the mask is set and nothing greater stands."""
    return torch.where(mask, scores.clamp(min=FORCED), scores)
