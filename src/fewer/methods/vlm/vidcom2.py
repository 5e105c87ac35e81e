"""VidCom2 (Liu et al., EMNLP 2025, "Video Compression Commander"): more tokens for frames that are unlike the video,
and of every frame the tokens that are unlike it and the video.

    x      the half of the channels that varies least, normalised
    g(c)_i = sum over a of exp(-|x_i - c|^2 / 2a)            a = 1/8, 1/4, 1/2, 1, 2
    v_i    = g(mean of the video)_i     f_i = g(mean of its frame)_i
    r_t    = r * (1 + softmax over t of (-mean of v in frame t) / 0.01 - 1 / frames), at most 1
    s_i    = -(v_i + f_i)                                    the best r_t of each frame stay, and at least one

Differs from the paper: every frame's share is rounded by largest remainder, so that as many stay as were asked for; the
authors round each frame alone, which gives the same wherever that adds up. Separators of rows count nowhere; theirs
come on top. A picture's crops are taken as frames; of a picture in one crop s_i is twice its likeness to the mean.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.errors import FewerError
from fewer.reduce.within import top_within
from fewer.signals.visual import Layout, Places
from fewer.types import Allocation, Budget, Card, Plan, Tokens

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


@dataclass(frozen=True)
class VidCom2:
    """What stands out of its frame and of the video.

    Args:
        channels: the share of the channels that is compared, those of least variance.
        temperature: how evenly frames share the budget; the smaller, the more the most unusual one gets.
    """

    channels: float = 0.5
    temperature: float = 0.01

    card: ClassVar[Card] = Card(
        source="arXiv 2505.14454",
        faithfulness="official",
        mechanism="prune",
        differs="frames' shares are rounded so that they add up to the budget",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Places()})

    def __post_init__(self) -> None:
        if not 0 < self.channels <= 1:
            raise FewerError(f"VidCom2(channels={self.channels!r}): a share of the channels, above 0 and up to 1")
        if not self.temperature > 0:
            raise FewerError(f"VidCom2(temperature={self.temperature!r}): above 0, such as 0.01")

    def score(self, tokens: Tokens) -> Tensor:
        video, frame = self._likeness(tokens)
        return -(video + frame).unsqueeze(0)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        frame = _frames(tokens)
        sizes = torch.bincount(frame)
        unusual = -_mean(self._likeness(tokens)[0].unsqueeze(1), frame)[:, 0]
        keep = int(allocation.counts)
        share = ((unusual - unusual.max()) / self.temperature).softmax(0)
        share = (keep / len(frame) * (1 + share - 1 / len(sizes))).clamp(max=1)
        counts = torch.tensor(Budget.split(keep, (share * sizes).tolist(), sizes.tolist()))
        if keep >= len(counts):  # every frame has a say
            for empty in (counts == 0).nonzero().flatten():
                counts[empty] = 1
                counts[counts.argmax()] -= 1
        return top_within(scores, frame, counts)

    def _likeness(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Each token's likeness to the video and to its frame."""
        x, frame = tokens.features[0].float(), _frames(tokens)
        calm = x.var(0, unbiased=False).argsort(stable=True)[: max(1, int(x.shape[-1] * self.channels))]
        x = F.normalize(x[:, calm], dim=-1)
        return _gauss(x - x.mean(0)), _gauss(x - _mean(x, frame)[frame])


def _frames(tokens: Tokens) -> Tensor:
    frames: Tensor = torch.unique(tokens.signal(Places, Layout).crop, return_inverse=True)[1]
    return frames


def _mean(x: Tensor, group: Tensor) -> Tensor:
    sizes = torch.bincount(group).unsqueeze(1)
    return x.new_zeros(len(sizes), x.shape[1]).index_add_(0, group, x) / sizes


def _gauss(off: Tensor) -> Tensor:
    far = off.square().sum(-1)
    return torch.stack([(-far / (2 * width)).exp() for width in WIDTHS]).sum(0)
