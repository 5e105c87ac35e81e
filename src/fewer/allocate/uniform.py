"""The same count at every head."""

import torch

from fewer.types import Allocation, Budget, Tokens


def uniform(tokens: Tokens, budget: Budget, window: int = 0) -> Allocation:
    """Every head of a row keeps `budget.count(seen)`, or all it has where that is less.

    Rows of no more than `window` tokens, which a window method cannot rate, are kept whole; the host says so.
    """
    seen = tokens.seen.tolist()
    short = [s for s in seen if s <= window and budget.count(s) < s]
    note = f"rows of {sorted(set(short))} tokens are no longer than the window of {window} and are kept whole" * bool(
        short
    )
    counts = torch.tensor([s if s <= window else budget.count(s) for s in seen], device=tokens.seen.device)
    available = tokens.available
    counts = counts.view(-1, *[1] * (available.ndim - 1))
    return Allocation(torch.minimum(counts.expand_as(available), available), note=note)
