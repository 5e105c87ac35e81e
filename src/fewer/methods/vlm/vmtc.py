"""VMTC, visual-modality token compression (Yang et al., 2024, "Enhancing Instruction-Following Capability of
Visual-Language Models by Reducing Image Redundancy"): what the tower looks at stays, the rest becomes cluster means.

    s_j        = mean over heads of A[class, j]             in the layer whose features the language model gets
    primary      the tokens with the greatest s_j
    merged       the others, in clusters by k-means with cosine; each the mean of its members, weighed by s_j

Differs from the paper: written from its abstract and reviews, as no code was found. What they do not say was chosen
here: half of what stays is primary; clusters start from tokens at even steps, and end when they stay the same; likeness
is that of the projected features. The paper's other half, the inhibition of attention, is the method `cmai`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.kmeans import by_cosine, folded
from fewer.signals.visual import By, Tower, TowerView
from fewer.types import Allocation, Budget, Card, Plan, Tokens


@dataclass(frozen=True)
class VMTC:
    """Primary tokens by the tower's attention, the others as clusters.

    Args:
        primary: the share of what stays that is not merged.
        by: whose attention counts, see `fewer.signals.visual.Tower`; "received" for towers without a class token.
    """

    primary: float = 0.5
    by: By = "class"

    card: ClassVar[Card] = Card(
        source="arXiv 2411.15453",
        faithfulness="style",
        mechanism="merge",
        differs="from the abstract and reviews; shares and start chosen here",
        slugs=("vmtc-cmai",),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.primary <= 1:
            raise FewerError(f"VMTC(primary={self.primary!r}): a share of what stays, from 0 to 1")

    @property
    def needs(self) -> frozenset[object]:
        return frozenset({Tower(self.by)})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(Tower, TowerView).attention.mean(0, keepdim=True)  # (1, n)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        keep = int(allocation.counts)
        alone = int(self.primary * keep)
        order = scores[0].argsort(descending=True, stable=True)
        primary, rest = order[:alone], order[alone:].sort().values
        label = torch.full_like(order, -1)
        label[primary] = torch.arange(alone, device=label.device)
        if keep > alone:
            label[rest] = alone + by_cosine(tokens.features[0, rest], keep - alone)
        return folded(label, scores[0])
