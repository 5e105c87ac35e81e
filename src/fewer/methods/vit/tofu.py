"""ToFu (arXiv 2312.01026): drop look-alikes early, where the network is far from linear, and merge them late.

    matching    ToMe's: even tokens propose to the odd token of greatest cosine, on keys averaged over heads
    early       the r best proposers are dropped
    late        they join, by MLERP: the mean of the group, rescaled to the norm of its longest member

A plain mean is shorter than its members, and norms shrink from block to block; MLERP keeps them. The scale depends on
the features, so each slot's weights sum to the scale rather than to one.

Differs from the paper: it gives no code, and what is here follows its abstract, its formula as cited and two
reimplementations (PiToMe's and OpenToMe's repositories). Both divide by the norm of the old destination rather than by
that of the new mean, which keeps no norm; ours is the formula. They prune one block more of twelve. Like theirs, the
mean is over members alike, whatever each stands for, and attention does not count sizes; masses are still kept.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fewer.allocate.joining import joining
from fewer.reduce.fold import gather_in, halves
from fewer.reduce.select import top_k
from fewer.score.heads import head_mean
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, FewerError, Matching, Plan, Tokens

FLAT = 1e-6
"""A mean shorter than this share of its longest member has no direction left that is worth stretching."""


@dataclass(frozen=True)
class ToFu:
    """Token fusion: pruning, then merging that keeps norms.

    Args:
        early: the share of the places, from the first on and rounded down, at which tokens are dropped.
    """

    early: float = 0.5

    card: ClassVar[Card] = Card(
        source="arXiv 2312.01026",
        faithfulness="style",
        mechanism="merge",
        differs="from the formula and two reimplementations; the norm is kept exactly, which theirs do not",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    halves: ClassVar[bool] = True
    masses: ClassVar[str] = "off"
    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.early <= 1:
            raise FewerError(f"early={self.early!r} is not a share of the places, in [0, 1]; the authors' is 0.5")

    def score(self, tokens: Tokens) -> Matching:
        return halves(tokens, head_mean(tokens.signal(Heads, Attended).key))

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        return joining(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        plan = top_k(scores.value, allocation)
        if tokens.site.place < int(self.early * tokens.site.places):
            return plan
        return _norm_kept(tokens, gather_in(tokens, plan, scores.partner, torch.ones_like(plan.weight)))


def _norm_kept(tokens: Tokens, plan: Plan) -> Plan:
    """The plan with the weights of each slot scaled, so that it is as long as its longest member."""
    there, into = plan.slot >= 0, plan.slot.clamp(min=0)
    x = tokens.features.float()
    norms = x.norm(dim=-1).masked_fill(~there, 0)
    zeros = norms.new_zeros(plan.survivors.shape)
    longest = zeros.scatter_reduce(-1, into, norms, "amax")
    mean = plan.apply(x).norm(dim=-1)
    grown = (zeros.scatter_add(-1, into, there.float()) > 1) & (mean > FLAT * longest)  # those alone stay as they are
    scale = torch.where(grown, longest / mean.clamp(min=torch.finfo(mean.dtype).tiny), 1)
    return replace(plan, weight=plan.weight * scale.gather(-1, into))
