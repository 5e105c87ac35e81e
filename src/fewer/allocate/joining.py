"""As many as the budget says, but no fewer than can be left where tokens join one another."""

from dataclasses import replace

import torch

from fewer.allocate.uniform import uniform
from fewer.types import Allocation, Budget, Matching, Tokens


def joining(tokens: Tokens, matching: Matching, budget: Budget) -> Allocation:
    """The budget's count, or the count of tokens that cannot be given up, where that is more: the next place has the
    rest to do, and after the last one the host says so."""
    asked = uniform(tokens, budget)
    return replace(asked, counts=torch.maximum(asked.counts, (matching.value == torch.inf).sum(-1)))


def halving(tokens: Tokens, budget: Budget) -> Allocation:
    """The same where any token may join any other, one of each pair leaving: half of those that are open stay."""
    asked = uniform(tokens, budget)
    open_ = (~(tokens.protected | tokens.padding)).sum(-1)
    return replace(asked, counts=torch.maximum(asked.counts, tokens.available - open_ // 2))
