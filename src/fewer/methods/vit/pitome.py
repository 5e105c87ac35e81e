"""PiToMe (arXiv 2405.16148): tokens in the middle of a crowd may merge, lonely ones are protected.

    energy      E_i = mean over tokens j of f(cos(key_i, key_j)), high where many are alike
                vision: f(c) = ELU(c - m)      text: f(c) = exp(-((1 - c) / (1 - m))^2 / 2) / ((1 - m) sqrt(2 pi))
    mergeable   the 2r tokens of most energy, in two halves A and B; everyone else is protected
                vision: the even ranks are A, the odd ranks B      text: the r of most energy are A, the next r B
    merge       every a in A joins the b of greatest cosine; slots are means, weighted by size
    early       in the first half of the blocks, vision splits all tokens by rank, and the r best pairs merge

The margin m falls with depth, from close crowds to wide ones. The authors' margins, at the first block and how far they
fall: DeiT, MAE (0.75, 0.75); AugReg, BLIP (0.9, 0.9); CLIP (0.95, 0.95); BLIP-2 (0.75, 0.4); BERT (0.9, 0.25).

Differs from the paper: it follows the authors' code where the two part, in f, in the split of the early blocks, and in
text, of which the code says so itself. Sizes weigh means and attention in both variants: the code's vision attention
leaves them out (`masses="off"` does too), and its text forgets them after each block. Padding takes no part, where the
code lets it merge, nor does a distillation token. The code's MAE has the early blocks late, and its CLIP for
transformers means by count and ToMe's matching at first; neither is offered.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.joining import halving
from fewer.reduce.fold import closed, fold
from fewer.score.heads import head_mean
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, Card, FewerError, Matching, Plan, Site, Tokens, UnknownName

MARGINS = {"vision": (0.9, 0.9), "text": (0.9, 0.25)}
TEXT_BLOCKS = 3
"""Of a text encoder the authors shorten the first blocks alone."""


@dataclass(frozen=True)
class PiToMe:
    """Merging that protects informative tokens.

    Args:
        variant: "vision", or "text", which acts in the first three blocks only.
        margin: the margin at the first block and how far it falls: m = margin[0] - margin[1] * block / blocks. Left
            out, (0.9, 0.9) for vision and (0.9, 0.25) for text; other hosts' are above.
    """

    variant: str = "vision"
    margin: tuple[float, float] | None = None

    card: ClassVar[Card] = Card(
        source="arXiv 2405.16148",
        faithfulness="official",
        mechanism="merge",
        differs="sizes weigh attention, which the vision code leaves out; padding takes no part",
        slugs=("pitome",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    halves: ClassVar[bool] = True
    schedule: ClassVar[str] = "geometric"

    def __post_init__(self) -> None:
        if self.variant not in MARGINS:
            raise UnknownName(f"variant={self.variant!r}: known are {', '.join(MARGINS)}")
        start, fall = self.margin or MARGINS[self.variant]
        if not (-1 <= start < 1 and -1 <= start - fall < 1):
            raise FewerError(f"margin={self.margin!r}: margins are cosines below 1 at both ends; BERT's is (0.9, 0.25)")

    def places(self, layers: int) -> list[int]:
        return list(range(layers if self.variant == "vision" else min(TEXT_BLOCKS, layers)))

    def score(self, tokens: Tokens) -> Tensor:
        """Minus the energy: who stands in a crowd may go."""
        unit, free = _unit(tokens), ~closed(tokens)
        crowd = self._kernel(unit @ unit.transpose(-1, -2), tokens.site)
        others = free.unsqueeze(-2)
        return -torch.where(others, crowd, 0).sum(-1) / others.sum(-1).clamp(min=1)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return halving(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        unit = _unit(tokens)
        a, b = self._sides(tokens, scores, allocation)
        alike = (unit @ unit.transpose(-1, -2)).masked_fill(~(a.unsqueeze(-1) & b.unsqueeze(-2)), -torch.inf)
        best = alike.max(-1)
        value = torch.where(a, -best.values, torch.inf).masked_fill(tokens.padding, -torch.inf)
        return fold(tokens, Matching(value, best.indices), allocation)

    def _kernel(self, cosine: Tensor, site: Site) -> Tensor:
        start, fall = self.margin or MARGINS[self.variant]
        margin = start - fall * site.layer / site.layers
        if self.variant == "vision":
            return F.elu(cosine - margin)
        width = 1 - margin
        return (-(((1 - cosine) / width) ** 2) / 2).exp() / (width * math.sqrt(2 * math.pi))

    def _sides(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> tuple[Tensor, Tensor]:
        """Who is in A and who in B; the rest is protected."""
        shut, leaving = closed(tokens), (tokens.available - allocation.counts).unsqueeze(-1)
        crowds_first = scores.masked_fill(shut, torch.inf).argsort(dim=-1, stable=True)
        rank = crowds_first.argsort(dim=-1)
        if self.variant == "text":
            return rank < leaving, (rank >= leaving) & (rank < 2 * leaving)
        early = tokens.site.layer < math.ceil(tokens.site.layers / 2)
        mergeable = ~shut if early else rank < 2 * leaving
        return mergeable & (rank % 2 == 0), mergeable & (rank % 2 == 1)


def _unit(tokens: Tokens) -> Tensor:
    return F.normalize(head_mean(tokens.signal(Heads, Attended).key).float(), dim=-1)
