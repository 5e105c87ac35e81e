"""MiniCache (arXiv 2405.14366): two neighbouring layers share the directions of their keys, and those of their values.

    from layer L / 2 on, layers l - 1 and l; for each token and head, with unit vectors u, w and the angle O between:
    e   = sin((1 - t) O) / sin O  u  +  sin(t O) / sin O  w        held once, with both lengths |x| and |y|
    x', y' = |x| e, |y| e                                          when attention reads them
    tokens with O > max - gamma (max - min) over the head stay whole in both layers

Differs from the paper: the rule for tokens that stay whole is read as a threshold on the angle, for each head, keys and
values apart; e has unit length again after mixing; tokens that come while decoding stay as they are until the next
prompt (`when="both"` merges them every so many steps); no bits are saved on top.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer import checks
from fewer.pairs import Half, Merged, Pair
from fewer.ragged import Part, Ragged
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, FewerError, Plan, Tokens

SMALL = 1e-6
"""Below this sine, the mix of two directions is a straight one: they are equal, or opposite."""


@dataclass(frozen=True)
class MiniCache:
    """Directions shared by layers two by two.

    Args:
        interpolation: t; 0 is the lower layer's direction, 1 the upper one's.
        gamma: share of the span of angles, from the largest down, at which tokens stay whole.
        start: share of the layers, from the first on, that are left alone.
    """

    interpolation: float = 0.6
    gamma: float = 0.05
    start: float = 0.5

    card: ClassVar[Card] = Card(
        source="arXiv 2405.14366",
        faithfulness="style",
        mechanism="merge",
        differs="tokens that stay whole are chosen for each head, keys and values apart; decoded tokens are not merged",
        slugs=("minicache",),
    )
    needs: ClassVar[frozenset[object]] = frozenset()
    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.shares(interpolation=self.interpolation, start=self.start)
        checks.numbers(gamma=self.gamma)

    def score(self, tokens: Tokens) -> Tensor:
        return torch.zeros_like(tokens.positions, dtype=torch.float32)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return Allocation(tokens.available)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    @property
    def pairs(self) -> "MiniCache":
        return self

    def couples(self, layers: int) -> list[tuple[int, int]]:
        return [(lower, lower + 1) for lower in range(int(self.start * layers), layers - 1, 2)]

    def encode_pair(self, lower: Ragged, upper: Ragged) -> tuple[Part, Part]:
        if not torch.equal(lower.positions, upper.positions) or lower.counts != upper.counts:
            raise FewerError("two layers can be held as a pair only where they keep the same tokens")
        if any(x is not None for part in (lower, upper) for x in (part.placed, part.mass)):
            raise FewerError("keys that were moved, or stand for several tokens, cannot be held as pairs of layers")
        counts = torch.tensor(lower.counts, device=lower.keys.device).flatten()
        head = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)  # of each entry
        pair = Pair(
            lower.positions,
            self._merged(lower.keys, upper.keys, head),
            self._merged(lower.values, upper.values, head),
        )
        first, second = (Half(lower.counts, pair.positions, None, None, lower.keys.dtype, pair, i) for i in (0, 1))
        return first, second

    def _merged(self, lower: Float[Tensor, "n d"], upper: Float[Tensor, "n d"], head: Int[Tensor, " n"]) -> Merged:
        direction, angle = self.mixed(lower, upper)
        heads = int(head.max()) + 1 if len(head) else 0
        widest, least = (
            angle.new_zeros(heads).scatter_reduce(0, head, angle, how, include_self=False) for how in ("amax", "amin")
        )
        own = angle > (widest - self.gamma * (widest - least))[head]
        both = torch.stack([lower, upper])
        lengths = both.float().norm(dim=-1).to(lower.dtype)
        at = own.nonzero().squeeze(1).to(torch.int32)
        return Merged(direction[~own].to(lower.dtype), lengths[:, ~own], both[:, own], at)

    def mixed(
        self, lower: Float[Tensor, "*n d"], upper: Float[Tensor, "*n d"]
    ) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n"]]:
        """The shared unit vectors, and the angles between the two layers in radians; both in float32."""
        u, w = (x / x.norm(dim=-1, keepdim=True).clamp(min=SMALL) for x in (lower.float(), upper.float()))
        angle = (u * w).sum(-1, keepdim=True).clamp(-1, 1).acos()
        t, sine = self.interpolation, angle.sin()
        curved = sine > SMALL
        left, right = (torch.where(curved, (share * angle).sin() / sine, share) for share in (1 - t, t))
        mix = left * u + right * w
        return mix / mix.norm(dim=-1, keepdim=True).clamp(min=SMALL), angle.squeeze(-1)
