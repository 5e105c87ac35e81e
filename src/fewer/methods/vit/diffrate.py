"""DiffRate (arXiv 2305.17997): prune the tail, merge the next of it into the head, at rates that were learned.

    sort     by the class token's attention, averaged over heads
    prune    all after the first `prune` tokens; then merge those after the first `merge` into the kept ones: each joins
             the one of greatest cosine of features, plain means, and its size counts times that cosine
    rates    both numbers for every block: published ones by name, learned ones from a fit, else from the budget
    learning distributions over counts; what leaves is masked, not removed, and gradients pass through masks and means;
             loss = distance to the whole model's output + lambda (FLOPs - target)^2, and only rates are trained

Differs from the paper: where no rates are named, `keep` gives the count of every block, and of those that leave 65% are
merged, the mean of the published rates with the last block left out. A cosine below 0 counts as 0. Where there is no
class token, tokens are sorted by the attention they receive. On other numbers of patches, named rates are scaled.
Learning: no labels, the whole model is the teacher. It starts at the best schedule that `keep` knows and runs a hundred
faster steps; the first block is left out; FLOPs are felt by that of the two rates that binds, in the authors'
code by both; in the end all counts are scaled to cost what was asked, and where the start was better, it stays. Only
for models that are read at their class token: those that pool would read what is masked.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fewer.allocate.rates import Rates
from fewer.allocate.uniform import uniform
from fewer.fit import Fit, fingerprint, load
from fewer.reduce.tail import prune_and_merge
from fewer.score.heads import attention_got
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, BudgetError, Card, Plan, Tokens, UnknownName


@cache
def published() -> dict[str, Rates]:
    """The authors' rates, by model and GFLOPs, from their compression_rate.json; patches alone are counted."""
    found = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {name: Rates.of(one) for name, one in found.items()}


@dataclass(frozen=True)
class DiffRate:
    """Pruning and merging together.

    With rates of a name or a fit, these say how many are left, and `keep` is a bound beside them: leave it at 1.0.

    Args:
        fit: learned rates, from `fit_to`; `load` reads them from a file.
        schedule_name: published rates, such as "deit-small-2.9", "mae-large-42.3"; see `published`.
        merged: of those that leave at a block, the share that is merged, where the budget alone says how many leave.
    """

    fit: Fit | None = None
    schedule_name: str | None = None
    merged: float = 0.65

    card: ClassVar[Card] = Card(
        source="arXiv 2305.17997",
        faithfulness="official",
        mechanism="prune",
        training="fit",
        differs="without named rates, 65% of what leaves is merged; rates are learned by distillation",
        slugs=("diffrate",),
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    fit_optional: ClassVar[bool] = True
    fits_on: ClassVar[str] = "images"

    def __post_init__(self) -> None:
        if not 0 <= self.merged <= 1:
            raise BudgetError(f"DiffRate(merged={self.merged!r}): the share of leaving tokens that merge is in [0, 1]")
        if self.fit is not None and self.schedule_name is not None:
            raise BudgetError(f"DiffRate has a fit and schedule_name={self.schedule_name!r}: give one of them")
        if self.schedule_name is not None and self.schedule_name not in published():
            raise UnknownName(f"schedule_name={self.schedule_name!r}: known are {', '.join(published())}")

    @classmethod
    def load(cls, path: str | Path) -> "DiffRate":
        """With the fit in this file."""
        return cls(load(path, "diffrate"))

    @property
    def rates(self) -> Rates | None:
        """The rates that were named, or learned."""
        if self.schedule_name is not None:
            return published()[self.schedule_name]
        return None if self.fit is None else Rates.of(self.fit.tensors)

    @property
    def exact(self) -> bool:
        """Whether `keep` alone says how many are left."""
        return self.rates is None

    def places(self, layers: int) -> list[int]:
        return list(range(1, layers)) or [0]

    def score(self, tokens: Tokens) -> Tensor:
        return attention_got(tokens.signal(Heads, Attended), tokens.site.prefix)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        asked = uniform(tokens, budget)
        if self.rates is None:
            return asked
        merge = self._beside(tokens) + self._named(self.rates, tokens)[1]
        return Allocation(torch.minimum(asked.counts, merge))

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        if self.rates is None:
            share = self.merged * (tokens.available - allocation.counts)
            between = allocation.counts + share.round().long()
        else:
            prune = self._beside(tokens) + self._named(self.rates, tokens)[0]
            between = torch.minimum(torch.maximum(prune, allocation.counts), tokens.available)
        return prune_and_merge(tokens, scores, allocation, between)

    def _beside(self, tokens: Tokens) -> Int[Tensor, " b"]:
        return (tokens.protected & ~tokens.padding).sum(-1)

    def _named(self, rates: Rates, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Patches left by pruning and by merging; of all that came in, as a padded row's own length says."""
        return rates.at(tokens.site.layer, tokens.site.layers, tokens.seen - self._beside(tokens))

    @staticmethod
    def fit_to(
        model: nn.Module, images: Iterable[Tensor], *, flops: float = 0.65, steps: int = 100, batch: int = 8,
        seed: int = 0, tick: Callable[[str, float], None] = lambda what, share: None,
    ) -> Fit:  # fmt: skip
        """Learn the rates at which this model's output changes least.

        Args:
            images: pixels, `(3, h, w)` or `(b, 3, h, w)`, prepared for the model and all of one size; no labels.
            flops: the share of the blocks' FLOPs that is to remain.
            steps: of learning, each on `batch` images.
            seed: of the order of images.
            tick: called with what is being done and the share of the work that is done.
        """
        from fewer.distill import learned  # which compresses, and so knows every method

        ours = fingerprint(model)

        def named(rates: Rates) -> DiffRate:
            return DiffRate(fit=Fit("diffrate", ours, rates.tensors))

        rates, notes = learned(model, images, DiffRate(), named, flops, steps, batch, seed, tick)
        return Fit("diffrate", ours, rates.tensors, notes)
