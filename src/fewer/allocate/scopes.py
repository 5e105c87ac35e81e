"""Top-k with three scopes: each token chooses features, each feature chooses tokens, or all pairs compete at once.

"Token choice", "feature choice" and "mutual choice" of sparse autoencoders (Ayonrinde 2024, arXiv 2411.02124). Rows and
columns may be anything: layers and heads, heads and tokens.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.types import BudgetError, FewerError

Scope = Literal["token", "feature", "global"]


def winners(scores: Float[Tensor, "*lead n f"], k: int, scope: Scope) -> Bool[Tensor, "*lead n f"]:
    """Who is among the best: exactly `k` of each row ("token"), of each column ("feature"), or of all rows and columns
    together ("global"), at each leading index.

    Of equal scores the earlier wins: the lower feature, the lower token, and in all the lower token first. What scores
    -inf is not there and never wins; +inf always does, as far as `k` goes.

    Raises:
        BudgetError: `k` is negative, or somewhere fewer than `k` are there.
        FewerError: a score is nan, or there is no such scope.

    >>> scores = torch.tensor([[9.0, 8.0, 1.0], [7.0, 2.0, 3.0]])
    >>> winners(scores, 1, "token").int().tolist(), winners(scores, 1, "feature").int().tolist()
    ([[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 1]])
    >>> winners(scores, 3, "global").int().tolist()
    [[1, 1, 0], [1, 0, 0]]
    """
    if scope not in ("token", "feature", "global"):
        raise FewerError(f"winners: scope={scope!r}; it is 'token', 'feature' or 'global'")
    if scope == "feature":
        return winners(scores.mT, k, "token").mT
    if scope == "global":
        return winners(scores.flatten(-2).unsqueeze(-2), k, "token").reshape(scores.shape)
    if scores.isnan().any():
        raise FewerError("winners: a score is nan, which is neither above nor below another")
    there = int((scores > -torch.inf).sum(-1).min()) if scores.numel() else scores.shape[-1]
    if not 0 <= k <= there:
        raise BudgetError(f"winners: k={k!r} cannot be met: a contest has {there} that may win; ask for 0 to {there}")
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
