"""TS-LLaVA (Qu et al., 2024, "Thumbnail-and-Sampling"): a video for a model of pictures, as a thumbnail of some frames
and a sample of all.

    thumbnail   six frames, evenly spaced from the first to the last, side by side as one small picture
    sample      tokens evenly spaced from the first to the last of all frames
    share       a sixth of what stays is thumbnail: 576 of 3456 tokens in the paper

Differs from the paper: the authors make the thumbnail from pixels and encode it as a picture; a method that sees the
tokens of frames can only pool each of these frames' features, to as many tokens as it would have in the thumbnail, and
its tokens keep their frames' places and do not see each other in the tower. Tokens whose place the thumbnail takes are
not sampled again. The authors say how many tokens are sampled; here it follows from the budget. A picture in one crop
is a video of one frame.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.bands import cover, rectangles
from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.groups import means
from fewer.signals.visual import Layout, Places
from fewer.types import Allocation, Budget, Card, Plan, Tokens, Transform


@dataclass(frozen=True)
class TSLLaVA:
    """Pooled frames, and a uniform sample.

    Args:
        frames: how many frames are in the thumbnail; 4, 6 or 8 in the paper.
        thumbnail: its share of what stays.
    """

    frames: int = 6
    thumbnail: float = 1 / 6

    card: ClassVar[Card] = Card(
        source="arXiv 2411.11066",
        faithfulness="style",
        mechanism="transform",
        differs="the thumbnail is pooled from features, not encoded from pixels",
        slugs=("ts-llava",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Places()})

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise FewerError(f"TSLLaVA(frames={self.frames!r}): at least one frame, 6 in the paper")
        if not 0 <= self.thumbnail <= 1:
            raise FewerError(f"TSLLaVA(thumbnail={self.thumbnail!r}): a share of what stays, from 0 to 1")

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros(tokens.positions.shape, device=tokens.positions.device)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Transform:
        layout, keep = tokens.signal(Places, Layout), int(allocation.counts)
        parts = rectangles(layout)
        parts = [parts[i] for i in spaced(len(parts), min(self.frames, len(parts))).tolist()]
        sizes = [len(part.index) for part in parts]
        pooled = min(round(keep * self.thumbnail), sum(sizes)) if keep < len(layout) else 0
        counts, n = Budget.split(pooled, [float(size) for size in sizes], sizes), len(layout)
        thumb = means(*cover(parts, counts, n)) if pooled else Plan.of(layout.crop[:0].unsqueeze(0), n)
        taken = thumb.survivors[0]
        free = torch.ones(n, dtype=torch.bool, device=taken.device)
        free[taken] = False
        rest = free.nonzero().flatten()
        sampled = rest[spaced(len(rest), keep - len(taken)).to(rest.device)]
        survivors = torch.cat([taken, sampled])
        order = survivors.argsort()
        matrix = torch.cat([Transform.of(thumb).matrix[0], F.one_hot(sampled, n).float()])
        return Transform(matrix[order].unsqueeze(0), survivors[order].unsqueeze(0))


def spaced(n: int, count: int) -> Tensor:
    """`count` of n, evenly spaced, the first and the last among them."""
    return torch.linspace(0, n - 1, count, dtype=torch.float64).round().long()
