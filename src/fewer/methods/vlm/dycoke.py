"""DyCoke (Tao et al., CVPR 2025): in every four frames of a video, drop what repeats the frame before.

    frames 1 2 3 4    frame 2 is compared with frame 1, frame 4 with frame 3, and then frame 3 with frame 1
    dropped           of each compared frame the share k of its tokens that is most like, by cosine, the token at the
                      same place in the other; frame 1 stays whole

Here k follows from the budget, and is the same for all compared frames up to one token. Where even k = 1 leaves more
than was asked for, groups double until it fits, and go on in the same way (frame 5 with frame 1, ..); a note says so.
Less than one frame is evenly spaced tokens of the first.

While decoding, deeper layers read some of the visual entries that are left, and which ones may change at every step:

    layers 0 .. 2     read everything
    after layer 2     a_t: the newest token's attention there to each visual entry, mean over heads
                      cos(a_t, a_t-1) < 0.9, or the first step: the share `read` of them with the largest a_t is chosen
                      else: the choice of the step before stays
    layers 3 ..       read text and the chosen entries

Nothing leaves the cache, so an entry that was set aside can come back: reads are saved (`Report.read`), bytes are not.
All visual entries of a row are chosen from together; the step after a turn chooses anew. keep=1.0 switches this off
too, and `read=1.0` does it alone.

Differs from the paper: layers are counted among those with an unbounded cache; several tokens at once read everything.
In the authors' code tokens of a frame come out in the order of likeness; here they keep the order of the frame; and the
share is rounded up here, down there. `official=True` follows three more facts of that code: frame 3 of the last group
stays whole; the last frame of an odd number leaves; and in a step whose attention is like the one before, deeper layers
read everything, where here the last choice stays. Pictures are an error.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.within import evenly, top_within
from fewer.score.frames import elsewhen, number
from fewer.signals.aside import Dynamic
from fewer.signals.visual import Layout, Places
from fewer.types import Allocation, Budget, Card, Plan, Tokens

WHOLE, GONE = 3.0, -1.0  # above and below 1 - cosine


@dataclass(frozen=True)
class DyCoke:
    """What is new since the frame before, in groups of frames.

    Args:
        group: how many frames have one that stays whole, a power of two.
        official: treat the last frames, and steps that are alike, as the authors' code does.
        layer: while decoding, the first layer that leaves visual entries unread; the one before it chooses.
        read: the share of the visual entries that these layers read (1 - p of the paper); 1.0 is all, always.
        alike: choose anew below this cosine between the attention of two steps.
    """

    group: int = 4
    official: bool = False
    layer: int = 3
    read: float = 0.3
    alike: float = 0.9

    card: ClassVar[Card] = Card(
        source="arXiv 2411.15024",
        faithfulness="official",
        mechanism="prune",
        differs="the last group as the others, and a choice stays while steps are alike, unless official=True; tokens "
        "in order",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Places()})
    videos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group < 2 or self.group & (self.group - 1):
            raise FewerError(f"DyCoke(group={self.group!r}): a power of two, 4 in the paper")
        if self.layer < 1:
            raise FewerError(f"DyCoke(layer={self.layer!r}): a layer before it chooses, so 1 or more; published: 3")
        if not 0 < self.read <= 1:
            raise FewerError(f"DyCoke(read={self.read!r}): a share of the visual entries, above 0 and up to 1.0")
        if not 0 <= self.alike <= 1:
            raise FewerError(f"DyCoke(alike={self.alike!r}): a cosine from 0 to 1; published: 0.9")

    @property
    def dynamic(self) -> Dynamic | None:
        """What happens while decoding, None for nothing."""
        return None if self.read == 1 else Dynamic(self.layer, self.read, self.alike, self.official)

    def score(self, tokens: Tokens) -> Tensor:
        layout, x = tokens.signal(Places, Layout), tokens.features[0].float()
        frame = number(layout, "DyCoke")
        place = frame % self.group
        back = place & -place  # frames 2, 4 of four look one back, frame 3 two: the lowest bit of their number
        other = elsewhen(layout, layout.crop - back)
        likeness = F.cosine_similarity(x, x[other], dim=-1)
        scores = torch.where((back == 0) | (other < 0), WHOLE, 1 - likeness)
        if self.official:
            frames = frame.new_zeros(int(layout.picture.max()) + 1).scatter_reduce(0, layout.picture, frame + 1, "amax")
            frames = frames[layout.picture]
            late = (back == 2) & (frame - back >= frames - 4)
            scores = torch.where(late, WHOLE, scores)
            scores = torch.where((frames % 2 == 1) & (frame == frames - 1), GONE, scores)
        return scores.unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        allocation = uniform(tokens, budget)
        group = self._fitting(tokens, scores, int(allocation.counts))[0].group
        note = (
            "" if group == self.group else f"DyCoke compares groups of {group} frames, not {self.group}, to keep so few"
        )
        return replace(allocation, note=note)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        _, scores = self._fitting(tokens, scores, int(allocation.counts))
        whole = (scores[0] == WHOLE).nonzero().flatten()
        if int(allocation.counts) < len(whole):
            return Plan.of(evenly(whole, int(allocation.counts)).unsqueeze(0), scores.shape[-1])
        crop = torch.unique(tokens.signal(Places, Layout).crop, return_inverse=True)[1]
        left, counts = int(allocation.counts), torch.zeros(int(crop.max()) + 1, dtype=torch.long)
        free = (scores[0] < WHOLE) & (scores[0] != GONE)
        for some in (scores[0] == WHOLE, free, scores[0] == GONE):  # what is to leave stays where all else does
            sizes = torch.bincount(crop[some], minlength=len(counts)).tolist()
            part = min(left, sum(sizes))
            counts += torch.tensor(Budget.split(part, [float(size) for size in sizes], sizes))
            left -= part
        return top_within(scores, crop, counts)

    def _fitting(self, tokens: Tokens, scores: Tensor, keep: int) -> "tuple[DyCoke, Tensor]":
        """The method with groups that are large enough, and its scores."""
        method, frames = self, len(tokens.signal(Places, Layout).grids)
        while keep < int((scores == WHOLE).sum()) and method.group < frames:
            method = replace(method, group=2 * method.group)
            scores = method.score(tokens)
        return method, scores
