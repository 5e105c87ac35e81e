"""RazorAttention (arXiv 2407.15891): whole caches for the heads that retrieve, a sketch of the past for all others.

    once: read random tokens repeated 4 times; a head's echo score is its attention to earlier copies of a query's own
    token, its induction score that to the tokens after them; the top 1% and 14% are retrieval heads
    retrieval heads keep every token
    others keep the first tokens, the recent ones, and one compensation token for the N dropped: key and value their
    means, and N times a token in the softmax (log N on its logit)

Differs from the paper: `keep` decides how long the others' windows are (there max(4000, n / 5)): what retrieval heads
leave of the total, shared alike. A key-value head is rated by its best query head, as in MindSpore's version of the
method. A compensation token that is compressed again goes into the next one with its mass; in bfloat16 a mean of some
hundred tokens is no longer moved by a few, so there compress seldom (`every`). Means are of rotated keys.
The scores are means over queries; a model that has a start token reads it first. ALiBi models have no rule here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from fewer import checks
from fewer.fit import Fit, fingerprint, load
from fewer.reduce.select import top_k
from fewer.score.copying import best_heads, head_scores
from fewer.score.position import sinks_stay
from fewer.signals import Step
from fewer.types import Allocation, Budget, BudgetError, Card, FewerError, Plan, Tokens


@dataclass(frozen=True)
class Mass:
    """What each kept key counts as: nothing to gather, but 4 bytes a key that a budget in bytes must know of."""

    key_bytes, lasting = 4, False
    nbytes = 0  # they are held, and counted, with the keys

    def start(self) -> "Mass":
        return self

    def observe(self, step: Step) -> None: ...

    def value(self) -> None: ...

    def regather(self, index: Tensor) -> None: ...

    def rows(self, index: Tensor) -> None: ...


@dataclass(frozen=True)
class RazorAttention:
    """Retrieval heads whole, the others with a window and a compensation token.

    Args:
        fit: its tensor `heads`, bool `(layers, key-value heads)`, says which retrieve; no default fits every model.
        sinks: first tokens that always stay.
    """

    fit: Fit | None = None
    sinks: int = 4

    card: ClassVar[Card] = Card(
        source="arXiv 2407.15891",
        faithfulness="paper",
        mechanism="compensate",
        training="fit",
        differs="keep decides the windows; key-value heads are rated by their best query head; no ALiBi rule",
        slugs=("razorattention",),
    )
    needs: ClassVar[frozenset[object]] = frozenset({Mass()})

    def __post_init__(self) -> None:
        checks.counts(0, sinks=self.sinks)

    @classmethod
    def load(cls, path: str | Path) -> "RazorAttention":
        """With the fit in this file."""
        return cls(load(path, "razorattention"))

    @staticmethod
    def fit_to(
        model: Any, contexts: Sequence[Any] = (), *, seed: int = 0,
        tick: Callable[[str, float], None] = lambda what, share: None,
        period: int = 2500, echo: float = 0.01, induction: float = 0.14,
    ) -> Fit:  # fmt: skip
        """The heads of a transformers decoder that copy: the best shares of all by echo and by induction score.

        No text is read (`contexts` is not looked at), only `period` random tokens four times; see `head_scores`.
        """
        tick("reading random tokens", 0.0)
        found = head_scores(model, period, seed=seed)
        heads = best_heads(found.echo, echo) | best_heads(found.induction, induction)
        notes = {"retrieval heads": f"{int(heads.sum())} of {heads.numel()}", "seed": str(seed)}
        tensors = {"heads": heads, "echo": found.echo, "induction": found.induction}
        return Fit("razorattention", fingerprint(model), tensors, notes)

    @property
    def heads(self) -> Bool[Tensor, "layers h"]:
        """Which heads keep everything."""
        if self.fit is None:
            raise FewerError(
                "RazorAttention must know which heads of the model retrieve: `fewer fit razorattention --model MODEL "
                "--out FILE`, then RazorAttention.load(FILE)"
            )
        return self.fit.tensors["heads"].bool()

    def score(self, tokens: Tokens) -> Tensor:
        return sinks_stay(tokens.positions.float(), tokens, self.sinks)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        whole, counts = self.heads, tokens.available.clone()
        if tokens.site.layer >= len(whole) or counts.shape[1] != whole.shape[1]:
            raise FewerError(f"layer {tokens.site.layer} of {counts.shape[1]} heads is not in a fit of {whole.shape}")
        retrieval, others = int(whole.sum()), int((~whole).sum())
        for row, seen in enumerate(tokens.seen.tolist()):
            total, held = budget.count(seen) * whole.numel(), retrieval * seen
            if held > total:
                least = math.ceil(1000 * retrieval / whole.numel()) / 1000
                raise BudgetError(
                    f"RazorAttention: {retrieval} of {whole.numel()} heads are kept whole, {held:,} tokens in all, and "
                    f"keep={budget.keep!r} lets {total:,} stay; ask for {least} or more, or fit with fewer such heads"
                )
            # every layer works the shares of all layers out, so nothing passes between them
            shares = torch.full(whole.shape, seen)
            shares[~whole] = torch.tensor(Budget.split(total - held, [1.0] * others, [seen] * others)).long()
            counts[row] = torch.minimum(shares[tokens.site.layer].to(counts.device), counts[row])
        return Allocation(counts)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        shortened = (allocation.counts > 0) & (allocation.counts < tokens.available)
        kept = top_k(scores, Allocation(allocation.counts - shortened.long())).slot >= 0
        rest = ~kept & ~tokens.padding & shortened.unsqueeze(-1)
        if not bool(rest.any()):
            return Plan.keep(kept)
        if bool((rest & tokens.protected).any()):
            raise BudgetError("RazorAttention: protected tokens leave no place for the compensation token; keep more")
        last = rest & (rest.flip(-1).cumsum(-1).flip(-1) == 1)
        plan = Plan.keep(kept | last)
        slot = torch.where(rest, (plan.slot * last).sum(-1, keepdim=True), plan.slot)
        # a compensation token from before goes in with all that it stands for
        mass = torch.ones_like(plan.weight) if tokens.mass is None else tokens.mass.float()
        mass = torch.where(slot < 0, 0.0, mass)
        into = slot.clamp(min=0)
        total = torch.zeros(plan.survivors.shape, device=mass.device).scatter_add(-1, into, mass)
        return replace(plan, slot=slot, weight=mass / total.gather(-1, into).clamp(min=1), mass=total)
