"""ToMe (arXiv 2210.09461, section 3): merge the tokens that are most alike, a few in every block.

    keys of the block, averaged over heads, in two halves: even tokens propose, odd ones take in
    each even token proposes to the odd token of greatest cosine; the r best proposals are carried out
    a merged token is the mean of its members, weighted by size, and attention adds log(size) to its logit

Differs from the paper: tokens stay in the order of the image, where the authors' code lists even tokens before odd
ones, so from the second block on the halves are others. In one block the same tokens are merged.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from fewer.allocate.joining import joining
from fewer.reduce.fold import fold, halves
from fewer.score.heads import head_mean
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, Matching, Plan, Tokens


@dataclass(frozen=True)
class ToMe:
    """Token merging. Attention counts sizes by default; for encoders trained by masked image modelling the authors turn
    that off: `compress(..., masses="off")`."""

    card: ClassVar[Card] = Card(
        source="arXiv 2210.09461",
        faithfulness="official",
        mechanism="merge",
        differs="tokens keep the image's order from block to block",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    halves: ClassVar[bool] = True

    def score(self, tokens: Tokens) -> Matching:
        return halves(tokens, head_mean(tokens.signal(Heads, Attended).key))

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        return joining(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        return fold(tokens, scores, allocation)
