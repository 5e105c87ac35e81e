"""Ward: merge the pairs whose merging loses the least, by Ward's criterion (Ward 1963, JASA 58) in ToMe's two halves.

    merging tokens x_a and x_b that stand for a and b originals into their size-weighted mean moves them away from it;
    the squared distances, weighted by size, add up to    ab / (a + b) |x_a - x_b|^2
    each even token proposes to the odd token where that is least; the r cheapest proposals are carried out

ToMe's cosine sees neither lengths nor sizes: it joins two large groups as readily as two single tokens. Here large
groups are dear, so groups stay even, and what is minimised is the very energy that the merge takes out of the features.

Differs from the paper: there is none for encoders; this is a baseline of our own, of Ward's cost on ToMe's matching.
Ward joins one pair at a time, among all; here even tokens join odd ones, all at once, and where several join the same
one, each is rated as if it were alone, so that the true loss can be greater than the sum of the costs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.allocate.joining import joining
from fewer.reduce.fold import fold, masses, propose
from fewer.score.heads import head_mean
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, Matching, Plan, Tokens, UnknownName

METRICS = ("features", "keys")


@dataclass(frozen=True)
class Ward:
    """Merging by the loss it causes.

    Args:
        metric: what distances are between. "features" are what is merged, so that the cost is the energy lost; "keys",
            averaged over heads, are ToMe's choice: they leave out what attention does not look for.
    """

    metric: str = "features"

    card: ClassVar[Card] = Card(
        source="baseline",
        faithfulness="own",
        mechanism="merge",
        differs="Ward's criterion on ToMe's halves, all pairs of a place at once",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    halves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UnknownName(f"metric={self.metric!r}: known are {', '.join(METRICS)}")

    def score(self, tokens: Tokens) -> Matching:
        x = tokens.features if self.metric == "features" else head_mean(tokens.signal(Heads, Attended).key)
        return propose(tokens, -_costs(x.float(), masses(tokens)))

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        return joining(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        return fold(tokens, scores, allocation)


def _costs(x: Float[Tensor, "b n d"], mass: Float[Tensor, "b n"]) -> Float[Tensor, "b even odd"]:
    """What joining each even token with each odd one loses."""
    a, b = mass[:, ::2, None], mass[:, None, 1::2]
    return a * b / (a + b).clamp(min=torch.finfo(mass.dtype).tiny) * torch.cdist(x[:, ::2], x[:, 1::2]).square()
