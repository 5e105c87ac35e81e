"""SparseVLM (Zhang et al., 2024): text tokens that belong to the picture rate its tokens; of what they would drop, the
best is recycled.

    raters    of the text that asks, the tokens t with mean over v of softmax_t(h_v . h_t) above the mean of all t
    s_v       mean over heads and raters of A[t, v], in each of three layers
    recycled  the 30 % best of the dropped, as clusters of about ten around density peaks, each averaged

`version=2` (SparseVLM+) recycles nothing. It divides A by the product that an all-ones query and key would have between
the same positions, before any softmax (far apart it may be negative, and is taken as it is), and takes the mean over
the 14 heads whose raters then look at the picture most. Of several pictures, each has its raters in the text after it.

Differs from the paper: counts come from the budget, not from a table, and the recycled tokens are inside them. Raters
are found at each cut among the states there; the authors find them once, among the inputs of the first layer. A
recycled token stands where the centre of its cluster stood and all tokens keep their positions, where the first
version's code appends the recycled ones and numbers anew. Of tokens equally dense the earlier counts as the denser,
where the authors add noise of 1e-6.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.select import top_k
from fewer.score.density import distances, peaks
from fewer.score.looking import asking, level
from fewer.signals.visual import Looked, TextAttention
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class SparseVLM:
    """Text raters, three cuts, recycling.

    Args:
        version: 1, or 2 for SparseVLM+.
        stages: the layers after which it cuts, of 32; other depths are cut at the same shares of theirs.
        heads: heads that count in version 2.
    """

    version: int = 1
    stages: tuple[int, ...] = (2, 6, 15)
    heads: int = 14

    card: ClassVar[Card] = Card(
        source="arXiv 2410.04417",
        faithfulness="paper",
        mechanism="merge",
        differs="exact counts with the recycled inside; raters among the states at each cut",
    )
    needs: ClassVar[frozenset[object]] = frozenset({TextAttention()})

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise FewerError(f"SparseVLM(version={self.version!r}): 1, or 2 for SparseVLM+")
        if not self.stages or not all(0 <= stage < 31 for stage in self.stages):
            raise FewerError(f"SparseVLM(stages={self.stages!r}): layers of 32 after which it cuts, from 0 to 30")
        if self.heads < 1:
            raise FewerError(f"SparseVLM(heads={self.heads!r}): at least one head has to count")

    def after(self, layers: int) -> tuple[int, ...]:
        return tuple(sorted({min(stage * layers // 32, layers - 2) for stage in self.stages}))

    def score(self, tokens: Tokens) -> Tensor:
        looked = tokens.signal(TextAttention, Looked)
        rows = asking(looked, self)
        alike = tokens.features[0].float() @ looked.states[rows].float().T  # (n, t)
        worth = alike.softmax(-1).mean(0)
        above = worth > worth.mean()
        rows = rows[above] if bool(above.any()) else rows
        given = looked.attention(rows)  # (heads, raters, n)
        if self.version == 2:
            given = given / level(looked, rows)
            given = given[given.sum((1, 2)).argsort(descending=True, stable=True)[: self.heads]]
        return given.mean((0, 1)).unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        keep, n = int(allocation.counts), scores.shape[-1]
        if self.version == 2 or keep == n or keep == 1:
            return top_k(scores, allocation)
        made = 1
        while made < min(keep - 1, _clusters(n - keep + made)):  # each one takes the place of a token
            made += 1
        order = n - 1 - scores[0].flip(-1).argsort(descending=True, stable=True)  # ties go to the later token
        again = order[keep - made :][: max(made, _recycled(n - keep + made))].sort().values
        x = tokens.features[:, again]
        apart = distances(x)
        worth = peaks(apart, torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device), made)[0]
        centre = worth.argsort(descending=True, stable=True)[:made].sort().values
        joins = apart[0][:, centre].argmin(-1)
        joins[centre] = torch.arange(made, device=x.device)
        survivors = torch.cat([order[: keep - made], again[centre]]).sort().values
        slot = torch.full((n,), -1, dtype=torch.long, device=x.device)
        slot[survivors] = torch.arange(keep, device=x.device)
        slot[again] = slot[again[centre]][joins]
        weight = (slot >= 0).float()
        weight[again] = 1 / torch.bincount(joins, minlength=made).float()[joins]
        return Plan(slot.unsqueeze(0), weight.unsqueeze(0), survivors.unsqueeze(0))


def _recycled(dropped: int) -> int:
    return int(dropped * 0.3) + 1


def _clusters(dropped: int) -> int:
    return _recycled(dropped) // 10 + 1
