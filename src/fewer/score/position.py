"""Scores from where a token stands."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.types import Tokens

FORCED = 2.0**127
"""The least that a method gives tokens that it always keeps: above every score. Up to +inf, which is for protected
tokens, float32 has 2^23 numbers, all of them for tokens that stay."""


def latest(tokens: Tokens, count: int) -> Bool[Tensor, "*lead n"]:
    """Marks the last `count` tokens of each row."""
    cut = (tokens.seen - count).view(-1, *[1] * (tokens.positions.ndim - 1))
    return (tokens.positions >= cut) & ~tokens.padding


def must_stay(scores: Float[Tensor, "*lead n"], mask: Bool[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
    """The same scores with `FORCED` where the mask is set and nothing greater stands.

    A budget below what must stay, such as one below a method's window, thus keeps the latest of it: `top_k` prefers
    the later of equals.
    """
    return torch.where(mask, scores.clamp(min=FORCED), scores)


def sinks_stay(scores: Float[Tensor, "*lead n"], tokens: Tokens, count: int) -> Float[Tensor, "*lead n"]:
    """The same scores with the first `count` tokens of each row, its sinks, above `FORCED`, the earlier the higher.

    A budget below what must stay thus lets go of everything else first, and of the first token last: it is the one
    that attention leans on most.
    """
    order = FORCED * (2 - (tokens.positions + 1).to(scores.dtype) * 2.0**-23)
    return torch.where((tokens.positions < count) & ~tokens.padding, torch.maximum(scores, order), scores)
