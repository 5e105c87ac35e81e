"""One total for all layers and heads, more to those whose tokens score high."""

import torch

from fewer.score.position import FORCED
from fewer.signals import EveryLayer, LayerScores
from fewer.types import Allocation, Budget, Tokens


def across_layers(tokens: Tokens, budget: Budget) -> Allocation:
    """Each row keeps the best of all its layers and heads together, exactly as many as even shares would be.

    Needs `EveryLayer`. What must stay comes first; a budget that cannot hold it is shared evenly, since then no layer
    is better than another.
    """
    every = tokens.signal(EveryLayer, LayerScores)
    counts = torch.empty_like(tokens.available)
    h = counts.shape[1]
    for row, seen in enumerate(tokens.seen.tolist()):
        share = budget.count(seen)
        scores = [layer[row] for layer in every.scores]
        there = sum(int((layer > -torch.inf).sum()) for layer in scores)  # an earlier compression may have left less
        must = sum(int((layer >= FORCED).sum()) for layer in scores)
        total = min(share * h * len(scores), there)
        if must > total:
            counts[row] = tokens.available[row].clamp(max=share)
        else:
            counts[row] = every.winners(row, total)[tokens.site.layer]
    return Allocation(counts)
