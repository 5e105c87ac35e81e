"""Zero-TPrune (arXiv 2305.17328): rank tokens on the graph of attention, drop those that repeat others, then the last.

    vote     s <- A^T s for each head ("weighted page rank"); the class token starts with sqrt(N) times the others' say
    filter   heads whose s varies too little or too much say nothing            (variance outside 0.01 ... 0.7)
    heads    root of the mean square of s over the others, so a token that matters to one head matters
    I'       one vote ranks the tokens; nobody leaves
    S        the less important half is compared with the other: of it go those most like one there, by cosine of keys
    I        30, 5 or 1 votes (first quarter, middle, last quarter of the blocks) among those left; the last in rank go

S comes first because a crowd of tokens that are alike would vote for one another.

Differs from the paper: written from summaries of it. Ours are: halves by rank in S, where the summaries deal tokens in
turn (`groups="alternate"`); the share of tokens that leaves there (the paper sets a count for every block); variances
of s scaled to a mean of one, over the tokens that may leave (sums of one could never reach the thresholds); all heads
count where none passes; attention is renormalised among those left after S; and the places, at the blocks 2, 4, 7, 10
and 12 of twelve. Tokens leave after the block's attention, not between blocks.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.alike import GROUPS, lower_group, repeating
from fewer.reduce.fold import closed
from fewer.reduce.select import top_k
from fewer.score.heads import votes
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, FewerError, Plan, Site, Tokens, UnknownName


@dataclass(frozen=True)
class ZeroTPrune:
    """Pruning by importance on the attention graph and by similarity, without training.

    Args:
        similar: share of the tokens that leave at a place which leaves for being like others; at most half of all can.
        votes: rounds of voting in the first quarter of the blocks, the middle half, and the last quarter.
        variance: least and greatest variance of a head that counts.
        groups: "sequential" compares the less important half with the rest; "alternate" deals tokens in turn by rank.
    """

    similar: float = 0.25
    votes: tuple[int, int, int] = (30, 5, 1)
    variance: tuple[float, float] = (0.01, 0.7)
    groups: str = "sequential"

    card: ClassVar[Card] = Card(
        source="arXiv 2305.17328",
        faithfulness="style",
        mechanism="prune",
        differs="from summaries: halves by rank, not dealt in turn; the two stages' split, the scale of variances and "
        "the places are ours",
        slugs=("zero-tprune",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    schedule: ClassVar[str] = "geometric"

    def __post_init__(self) -> None:
        if not 0 <= self.similar <= 1:
            raise FewerError(f"similar={self.similar!r} is not a share of the tokens that leave, in [0, 1]")
        if len(self.votes) != 3 or min(self.votes) < 1:
            raise FewerError(f"votes={self.votes!r}: takes three counts from 1 on, for first, middle and last blocks")
        if len(self.variance) != 2 or not 0 <= self.variance[0] <= self.variance[1]:
            raise FewerError(f"variance={self.variance!r}: takes a least and a greatest variance, as in (0.01, 0.7)")
        if self.groups not in GROUPS:
            raise UnknownName(f"groups={self.groups!r}: known are {', '.join(GROUPS)}")

    def places(self, layers: int) -> list[int]:
        return [min(layers - 1, round(layers * at / 12)) for at in (1, 3, 6, 9, 11)]

    def score(self, tokens: Tokens) -> Tensor:
        return self._importance(tokens, tokens.padding, 1)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        lower = lower_group(tokens, scores, self.groups)
        leaving = ((tokens.available - allocation.counts) * self.similar).long().minimum(lower.sum(-1))
        keys = tokens.signal(Heads, Attended).key.transpose(1, 2).flatten(2)
        gone = repeating(tokens, lower, keys, leaving)
        ranked = self._importance(tokens, tokens.padding | gone, self._rounds(tokens.site))
        ranked = ranked.masked_fill(tokens.protected, torch.inf).masked_fill(tokens.padding | gone, -torch.inf)
        return top_k(ranked, allocation)

    def _rounds(self, site: Site) -> int:
        return self.votes[0 if 4 * site.layer < site.layers else 1 if 4 * site.layer < 3 * site.layers else 2]

    def _importance(self, tokens: Tokens, gone: Tensor, rounds: int) -> Float[Tensor, "b n"]:
        """Each token's importance on the graph of those that are not `gone`."""
        attended = tokens.signal(Heads, Attended)
        hidden = torch.zeros_like(gone, dtype=torch.float32).masked_fill(gone, -torch.inf)[:, None, None]
        graph = replace(attended, bias=hidden if attended.bias is None else attended.bias + hidden)
        say = (~gone).float()
        if tokens.site.prefix and attended.classed:
            say[:, 0] = (~gone).sum(-1).float().sqrt()
        s = votes(graph, say / say.sum(-1, keepdim=True), rounds)  # (b, h, n)
        rated = (~(closed(tokens) | gone)).float().unsqueeze(1)
        among = rated.sum(-1, keepdim=True).clamp(min=1)
        mean = (s * rated).sum(-1, keepdim=True) / among
        varied = ((s / mean.clamp(min=torch.finfo(s.dtype).tiny) - 1).square() * rated).sum(-1) / among.squeeze(-1)
        heard = (varied >= self.variance[0]) & (varied <= self.variance[1])  # (b, h)
        heard = (heard | ~heard.any(-1, keepdim=True)).float().unsqueeze(-1)
        return ((s.square() * heard).sum(1) / heard.sum(1)).sqrt()
