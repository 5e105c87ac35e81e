"""One forward of an encoder under way: what is left, and what the host's own tables become for it."""

from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from fewer.adapters.encoder_seam import gathered
from fewer.types import Budget, Reduction, UnsupportedModel

POSITIONS = ("survivor", "centroid")


@dataclass
class State:
    """One forward under way: what is left, and how it came to be."""

    first: Tensor  # (b, originals), the class and register tokens, which stay in front
    padding: Tensor  # (b, n)
    positions: Tensor  # (b, n), the original that gives each token its place
    mass: Tensor | None  # (b, n), None while each is one
    originals: int
    prefix: int
    grid: tuple[int, int] | None
    seen: Tensor  # (b,)
    budgets: dict[int, Budget]
    ragged: bool = True  # whether some row may have padding
    plans: list[Reduction] = field(default_factory=list)  # what has left so far, place by place
    handed: tuple[Tensor, Tensor] | None = None  # what the host got from the latest block, restored, and what is left

    @property
    def merged(self) -> Reduction | None:
        """From the originals to what is left, as one; None where nobody left. Composed when it is asked for."""
        return reduce(lambda first, then: first.then(then), self.plans) if self.plans else None

    def bias(self, weigh: bool) -> Tensor | None:
        """What is added to the logits of each key: -inf for padding, and its mass's logarithm, if masses weigh."""
        weigh = weigh and self.mass is not None
        padded = self.ragged and bool(self.padding.any())
        if not weigh and not padded:
            return None
        ones = torch.zeros_like(self.positions, dtype=torch.float32)
        bias = self.mass.clamp(min=torch.finfo(torch.float32).tiny).log() if weigh and self.mass is not None else ones
        return (bias.masked_fill(self.padding, -torch.inf) if padded else bias)[:, None, None]

    def cut(self, bias: Tensor) -> Tensor:
        """A host's own bias between tokens, on those that are left."""
        if not self.plans:
            return bias
        return gathered(bias, self.positions, self.originals)

    def rope(self, rope: Tensor, positions: str) -> Tensor:
        """Rotary tables of the originals, sines first, on those that are left: `(patches, d)`, `(heads, patches, d)` or
        `(b, 1 or heads, patches, d)`.

        The centroid is where the mean of the members' rotations points. For members within half a turn of each other
        that is the rotation of their mean coordinate; for fast channels of members far apart it is not.
        """
        merged = self.merged if positions == "centroid" else None
        if not self.plans:
            return rope
        b, prefix = len(self.seen), self.prefix
        if rope.shape[-2] != self.originals - prefix:
            raise UnsupportedModel(f"rotary tables of shape {tuple(rope.shape)} are not one row a patch")
        rope = rope[(None,) * (4 - rope.ndim)]  # (1 or b, 1 or heads, patches, d)
        rope = rope.expand(b, *rope.shape[1:])
        if positions == "survivor":
            at = (self.positions[:, prefix:] - prefix).clamp(min=0)[:, None, :, None]
            return rope.gather(2, at.expand(b, rope.shape[1], -1, rope.shape[-1]))
        wide = torch.nn.functional.pad(rope.transpose(1, 2).flatten(2), (0, 0, prefix, 0))
        assert merged is not None
        turned = merged.apply(wide.float())[:, prefix:]
        turned = turned.view(b, -1, rope.shape[1], rope.shape[-1]).transpose(1, 2)
        sin, cos = turned.chunk(2, -1)
        length = (sin.square() + cos.square()).sqrt().clamp(min=1e-6)
        return torch.cat([sin / length, cos / length], -1).to(rope.dtype)
