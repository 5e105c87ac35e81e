"""Rates: at every block, how many patches are left by pruning and then by merging; published, or learned.

Rates     the numbers, as data
Proxies   the same while they are learned (DiffRate, section 3): for each block and way a distribution over counts,
          whose mean, rounded up, is the rate; gradients pass the rounding straight through
learn     moves proxies until a loss and a cost are low, and gives the rates that meet the target
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.types import BudgetError

SPREAD = 0.1
"""Of the distribution that learning starts from, as a share of the patches."""
RATE, LAST_RATE = 0.2, 0.02
"""Of learning; falls as a cosine does. The authors' are a twentieth of it, for many times the steps."""
LAMBDA = 100.0
"""Weight of the squared miss in FLOPs, in shares of all, beside a loss that starts at about one."""


@dataclass(frozen=True)
class Rates:
    """Of `patches`, how many are left by pruning, and by pruning and merging, at every block.

    >>> Rates((4, 3, 2), (4, 3, 1), 4).at(2, 3, torch.tensor([4, 40]))
    (tensor([ 2, 20]), tensor([ 1, 10]))
    """

    prune: tuple[int, ...]
    merge: tuple[int, ...]
    patches: int

    @classmethod
    def of(cls, found: Mapping[str, Sequence[int] | Tensor | int]) -> "Rates":
        """From tensors or lists of these names."""
        prune, merge = (tuple(int(one) for one in found[name]) for name in ("prune", "merge"))  # type: ignore[union-attr]
        return cls(prune, merge, int(found["patches"]))  # type: ignore[arg-type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            "prune": torch.tensor(self.prune),
            "merge": torch.tensor(self.merge),
            "patches": torch.tensor(self.patches),
        }

    @property
    def ends(self) -> list[tuple[int, int]]:
        """Patches that come to each block, and that are left after it."""
        came = [self.patches]
        for prune, merge in zip(self.prune, self.merge, strict=True):
            came.append(min(came[-1], prune, merge))
        return list(pairwise(came))

    def at(self, layer: int, layers: int, free: Int[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Patches left by pruning and by merging at this block, of `free` in each row: in proportion, one at least."""
        if layers != len(self.prune):
            raise BudgetError(f"rates for {len(self.prune)} blocks, and this encoder has {layers}")
        prune, merge = (
            (free * kept[layer] / self.patches).round().long().clamp(min=1) for kept in (self.prune, self.merge)
        )
        return prune, torch.minimum(prune, merge)


class Proxies:
    """Rates as distributions over 1 to `patches`, for pruning (0) and merging (1); the first block lets nobody go."""

    def __init__(self, start: Rates) -> None:
        self.patches = start.patches
        self.counts = torch.arange(1.0, start.patches + 1)
        wide = max(SPREAD * start.patches, 0.7)
        means = torch.tensor([start.prune, start.merge]).unsqueeze(-1)
        self.logits = (-((self.counts - means) ** 2) / (2 * wide**2)).requires_grad_()  # (2, layers, patches)

    def means(self) -> Float[Tensor, "2 layers"]:
        return (self.logits.softmax(-1) * self.counts).sum(-1)

    def kept(self, way: int, layer: int) -> Float[Tensor, ""]:
        """The mean, rounded up."""
        mean = self.means()[way, layer]
        return mean + (mean.ceil() - mean).detach()

    def stays(self, way: int, layer: int) -> Float[Tensor, " patches"]:
        """How likely the patch of each rank, from 0, is left: that more are left than its rank."""
        return self.logits[way, layer].softmax(-1).flip(-1).cumsum(-1).flip(-1)

    def rates(self, scale: float = 1.0) -> Rates:
        """The counts as they are, or all times `scale`."""
        scaled = (self.means().detach() * scale).ceil().clamp(1, self.patches).long()
        scaled[:, 0] = self.patches
        return Rates(tuple(scaled[0].tolist()), tuple(scaled[1].tolist()), self.patches)

    def settled(self, cost: Callable[[Rates], float], target: float) -> Rates:
        """The counts, scaled so that they cost as much of `target` as they can."""
        low, high = 0.0, 2.0
        if cost(self.rates(low)) > target:
            raise BudgetError(
                f"with a single patch left after the first block, {cost(self.rates(low)):.2f} of the FLOPs remain"
            )
        while cost(self.rates(high)) <= target and high < 2 * self.patches:
            high *= 2
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(self.rates(middle)) <= target else (low, middle)
        return self.rates(low)


def learn(
    proxies: Proxies, loss: Callable[[int], tuple[Tensor, Tensor]], target: float, steps: int,
    tick: Callable[[float], None] = lambda share: None,
) -> None:  # fmt: skip
    """Adam on the proxies alone.

    Args:
        loss: for a step, the distance to the teacher and the share of FLOPs, both with their graphs.
    """
    optimizer = torch.optim.Adam([proxies.logits])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
        distance, share = loss(step)
        (proxies.logits.grad,) = torch.autograd.grad(distance + LAMBDA * (share - target) ** 2, [proxies.logits])
        optimizer.step()
        tick((step + 1) / steps)
