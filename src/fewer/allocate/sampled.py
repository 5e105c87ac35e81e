"""Draw tokens at even steps of their cumulative worth: how many stay is an outcome."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.types import Allocation, Budget, Tokens


@dataclass(frozen=True, kw_only=True)
class Sampled(Allocation):
    """Counts that came of drawing tokens, and who was drawn."""

    kept: Bool[Tensor, "b n"]


def quantiles(tokens: Tokens, scores: Float[Tensor, "b n"], budget: Budget) -> Sampled:
    """Inverse transform sampling (ATS): of K samples at 1/2K, 3/2K ... of the cumulative score, in the tokens' order,
    each takes the token whose cumulative score is nearest, the first of equals; a token taken twice is there once.

    K is the budget beside the protected tokens, which all stay. A budget of everything keeps everything.
    """
    shut = tokens.protected | tokens.padding
    # in float64: in float32 worth of 1e-8 is lost beside a sum near one, or not, as rounding has it
    worth = scores.double().masked_fill(shut, 0)
    share = worth.cumsum(-1) / worth.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    share = share.masked_fill((~shut).cumsum(-1) == 0, -torch.inf)  # nothing before the first that may be drawn
    asked = torch.tensor([budget.count(s) for s in tokens.seen.tolist()], device=shut.device)
    k = (asked - (tokens.protected & ~tokens.padding).sum(-1)).clamp(min=0).unsqueeze(-1)
    step = torch.arange(int(k.max()), device=shut.device)
    at = (2 * step + 1).double() / (2 * k)  # (b, K)
    after = torch.searchsorted(share, at).clamp(max=shut.shape[-1] - 1)
    before = (after - 1).clamp(min=0)
    low, high = share.gather(-1, before), share.gather(-1, after)
    near = torch.searchsorted(share, torch.where(at - low <= high - at, low, high))  # the first of equals
    times = torch.zeros_like(share).scatter_add(-1, near, (step < k).to(share.dtype))
    kept = (times > 0) | tokens.protected | (asked >= tokens.seen).unsqueeze(-1)
    kept = kept & ~tokens.padding
    return Sampled(kept.sum(-1), kept=kept)
