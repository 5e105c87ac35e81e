"""CDPruner (Zhang et al., 2025, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in
MLLMs"): keep tokens that are far from each other and near to the question, as a determinantal point process.

    q_i   = mean over the question's tokens t of cosine(x_i, t), scaled to [0, 1]
    L_ij  = q_i * cosine(x_i, x_j) * q_j
    S     = the set with (nearly) the greatest det(L_S), one token after the other: the one that adds the most volume

The greedy choice keeps a Cholesky factor up to date (Chen et al., 2018), so that a step costs as much as the tokens
that are chosen.

Differs from the paper: with CLIP, the authors compare images with sentences in CLIP's own space, and take *minus* the
cosine, which they found to be the right sign of CLIP's dense features (`sign=-1`). A language model's host hands over
no CLIP text tower, so the question's input embeddings are compared with the projected tokens, with the plain sign, as
the paper does for towers without a text side. Their code scales q by the least and greatest of a whole batch, so that
scores depend on what else is in it; here they are always those of the tokens that are decided about.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.signals.visual import Question
from fewer.types import Allocation, Budget, Card, Plan, Tokens

EPS = 1e-6


@dataclass(frozen=True)
class CDPruner:
    """Diversity, conditioned on the question.

    Args:
        sign: +1 if like means relevant; -1 as the authors have it for CLIP's dense features.
    """

    sign: int = 1

    card: ClassVar[Card] = Card(
        source="arXiv 2506.10967",
        faithfulness="paper",
        mechanism="prune",
        differs="relevance from the language model's embeddings of the question; kernel and choice as the authors'",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Question()})

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise FewerError(
                f"CDPruner(sign={self.sign!r}): 1 or -1, whether tokens like the question's count for more"
            )

    def score(self, tokens: Tokens) -> Tensor:
        """The relevance q."""
        x = F.normalize(tokens.features[0].float(), dim=-1)
        asked = F.normalize(tokens.signal(Question, Tensor)[0].float(), dim=-1)
        near = self.sign * (x @ asked.T).mean(-1)
        wide = near.max() - near.min()
        return torch.where(wide > 0, (near - near.min() + EPS) / wide, 1).unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        x, q = F.normalize(tokens.features[0].float(), dim=-1), scores[0]
        kernel = q.unsqueeze(1) * (x @ x.T) * q
        return Plan.of(volume(kernel, int(allocation.counts)).sort().values.unsqueeze(0), len(q))


def volume(kernel: Tensor, count: int) -> Tensor:
    """Indices of a set with a great determinant of its part of `kernel` (n, n), in the order of the choice.

    What a token still adds is never taken for less than a millionth of what it would add alone: below that are rounding
    errors. Where no more is left of any, as of more tokens than there are dimensions, these millionths decide.
    """
    alone = kernel.diagonal()
    adds, least = alone.clone(), EPS * alone
    factor = kernel.new_zeros(count, len(kernel))
    taken = torch.zeros_like(alone)
    chosen = []
    for i in range(count):
        best = (torch.maximum(adds, least) + taken).argmax()
        row = (kernel[best] - factor[:i, best] @ factor[:i]) / adds[best].clamp(min=0).sqrt()
        factor[i] = torch.where(adds[best] > least[best], row, 0)
        adds = adds - factor[i].square()
        taken[best] = -torch.inf
        chosen.append(best)
    return torch.stack(chosen)
