"""Density peaks: tokens that many others are near to, and that are far from all denser ones."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def distances(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n n"]:
    """Euclidean distances over the square root of the width."""
    x = x.float()
    apart: Tensor = torch.cdist(x, x) / x.shape[-1] ** 0.5
    return apart


def peaks(apart: Float[Tensor, "b n n"], closed: Bool[Tensor, "b n"], k: int) -> Float[Tensor, "b n"]:
    """The logarithm of density times the distance to the nearest denser token; of tokens equally dense the earlier
    counts as the denser. Densities are never taken out of their logarithm: sparse ones would underflow to a tie.

    Closed tokens are nobody's neighbours; their own numbers mean nothing.
    """
    n = apart.shape[-1]
    pairs = closed.unsqueeze(1) | closed.unsqueeze(2)
    near = apart.masked_fill(closed.unsqueeze(1), torch.inf).topk(min(k, n), largest=False).values
    found = near.isfinite()  # a short row has fewer than k
    density = -near.masked_fill(~found, 0).square().sum(-1) / found.sum(-1).clamp(min=1)
    mine, theirs = density.unsqueeze(2), density.unsqueeze(1)
    first = torch.ones(n, n, dtype=torch.bool, device=apart.device).tril(-1)
    denser = (theirs > mine) | ((theirs == mine) & first)
    widest = apart.masked_fill(pairs, 0).amax((1, 2)).unsqueeze(-1)
    above = apart.masked_fill(~denser | pairs, torch.inf).amin(-1)
    delta = torch.where(above.isfinite(), above, widest)
    return density + delta.clamp(min=torch.finfo(delta.dtype).tiny).log()  # a token on top of another is still a token
