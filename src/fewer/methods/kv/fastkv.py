"""FastKV (arXiv 2502.01068): the early layers read the whole prompt, the others only what matters of it.

    s = window attention, pooled, summed over the query heads of a group                     (b, h, n)
    layers up to l   read the whole prompt; their caches keep the window and the top of s, as in SnapKV
    at layer l       the window and the top of sum_h s go on: later layers read these tokens alone
    layers after l   choose by the same rule among what they read, and keep the same share of the whole prompt

How many tokens go on (`rate`) decides what reading the prompt costs, `keep` what the cache holds.

Differs from the paper: means in the place of sums, which rank alike; rates are rounded up, and no fewer tokens than the
window go on; with a keep above the rate, later layers keep all they were given.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewer import checks
from fewer.allocate.uniform import uniform
from fewer.methods.kv.snapkv import SnapKV
from fewer.reduce.select import top_k
from fewer.types import Allocation, Budget, Card, FewerError, Keep, Plan, Tokens


@dataclass(frozen=True)
class FastKV:
    """Window attention, and a prompt that is cut on its way through the layers.

    Args:
        window: last queries that observe, and last tokens that stay and go on.
        kernel: width of the pooling, odd.
        layer: the last layer that reads the whole prompt: its index among the layers that are compressed, or a fraction
            of their number (published for 15 of 32).
        rate: what goes on: a fraction of the prompt, or a count of tokens.
    """

    window: int = 8
    kernel: int = 7
    layer: float | int = 15 / 32
    rate: Keep = 0.25

    card: ClassVar[Card] = Card(
        source="arXiv 2502.01068",
        faithfulness="official",
        mechanism="propagate",
        differs="rates are rounded up, and at least the window goes on",
        slugs=("fastkv",),
    )

    def __post_init__(self) -> None:
        checks.counts(window=self.window)
        checks.odd(kernel=self.kernel)
        if Budget.parse(self.rate).size is not None:
            raise FewerError(f"rate={self.rate!r}: a fraction of the prompt, or a count of tokens, goes on")

    @property
    def needs(self) -> frozenset[object]:
        return self._scorer.needs

    @property
    def _scorer(self) -> SnapKV:
        return SnapKV(self.window, self.kernel)

    def score(self, tokens: Tokens) -> Tensor:
        return self._scorer.score(tokens)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget, self.window)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)

    def shortens(self, layers: int) -> int:
        """The layer, of so many, after which fewer tokens are read; `FewerError` where there is none such."""
        chosen = self.layer if isinstance(self.layer, int) else int(self.layer * layers + 1e-9)
        if not 0 <= chosen < layers:
            raise FewerError(f"layer={self.layer!r}: an index, or a fraction, of the {layers} layers to compress")
        return chosen

    def go_on(self, tokens: Tokens, scores: Tensor) -> Plan:
        """Which of a forward's tokens later layers read, by their scores `(b, h, n)` at the chosen layer."""
        rate, given = Budget.parse(self.rate), tokens.available[:, 0].tolist()
        counts = [max(rate.count(n), min(n, self.window)) for n in given]
        return top_k(scores.sum(1), Allocation(torch.tensor(counts, device=scores.device)))
