"""CriticalKV (arXiv 2502.03805): what matters is what dropping a token does to the attention's output.

    first   the top of s takes `first` of a head's budget
    then    the top of (s + eps) * ||v W_o||_1 among the others takes the rest

where s is any scorer's, and W_o is the output projection of the query head; norms are averaged over the query heads
that share a key-value head. Around AdaKV it is the paper's other variant, in which the heads' guaranteed tokens are
chosen by s as well.

Differs from the paper: tokens that the scorer always keeps, such as SnapKV's window, stay in both stages, where the
authors' code for kvpress weighs them by their values like the others; halves are rounded down and may be none at all,
where its latest release takes at least one token first.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fewer import checks
from fewer.attention import BLOCK_CELLS
from fewer.inner import must_evict, must_keep_the_top
from fewer.methods.kv.snapkv import SnapKV
from fewer.reduce.select import top_k
from fewer.score.position import FORCED, must_stay
from fewer.signals import OutputWeight, Projection, blank
from fewer.types import Allocation, Budget, Card, FewerError, Method, MissingSignal, Plan, Tokens


@dataclass(frozen=True)
class CriticalKV:
    """Two stages around any scorer, the second by what a value is worth once it is projected.

    Args:
        scorer: any method whose scores are not negative, and that keeps the highest of them; its needs and its shares
            are used, and when it acts.
        first: share of a head's budget that goes by the scores alone.
        eps: what every score is raised by in the second stage, so that no value counts for nothing.

    Raises:
        FewerError: the scorer does more than keep its highest scores, or gives negative ones, which a product with a
            norm would turn around.
        MissingSignal: the model's output projection was not found, or there are no values.
    """

    scorer: Method = field(default_factory=SnapKV)
    first: float = 0.5
    eps: float = 1e-4

    card: ClassVar[Card] = Card(
        source="arXiv 2502.03805",
        faithfulness="official",
        differs="the scorer's forced tokens stay in both stages",
    )

    def __post_init__(self) -> None:
        checks.shares(first=self.first)
        checks.numbers(eps=self.eps)
        must_evict(self, self.scorer)
        must_keep_the_top(self, self.scorer)

    @property
    def needs(self) -> frozenset[Any]:
        return self.scorer.needs | {Projection()}

    def score(self, tokens: Tokens) -> Tensor:
        rated: Tensor = self.scorer.score(tokens)
        return rated

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return self.scorer.allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        free = scores.isfinite() & (scores < FORCED)  # neither protected, padding nor forced
        if bool((scores[free] < 0).any()):
            raise FewerError(
                f"CriticalKV multiplies scores with norms and needs them to be at least 0; "
                f"{type(self.scorer).__name__} gives negative ones"
            )
        first = (allocation.counts * self.first + 1e-6).long()
        if allocation.floor is not None:
            first = torch.maximum(first, allocation.floor)
        sure = top_k(scores, Allocation(first)).slot >= 0
        worth = (scores + self.eps) * projected_norms(tokens)
        return top_k(must_stay(torch.where(free, worth, scores), sure), allocation)


def projected_norms(tokens: Tokens) -> Float[Tensor, "b h n"]:
    """The L1 norm of each value as the layer's output projection writes it, averaged over its query heads."""
    if tokens.values is None:
        raise MissingSignal("CriticalKV weighs keys by their values, and there are no values here")
    weight = tokens.signal(Projection, OutputWeight).weight  # (heads, e, hidden)
    values = blank(tokens.values, tokens.padding)
    b, h, n, _ = values.shape
    groups, hidden = weight.shape[0] // h, weight.shape[2]
    norms = values.new_zeros(b, h, n).float()
    size = max(1, BLOCK_CELLS // max(1, b * hidden))
    for head in range(weight.shape[0]):
        for start in range(0, n, size):
            at = slice(start, start + size)
            written = values[:, head // groups, at].float() @ weight[head].float()  # (b, block, hidden)
            norms[:, head // groups, at] += written.abs().sum(-1)
    return norms / groups
