"""MCTF (arXiv 2403.10030): multi-criteria token fusion, merging tokens that are alike, say little and are small.

    pull of a and b    ((cos + 1) / 2) * (info_a info_b)^(1/20) * (1/size_a 1/size_b)^(1/40), cosines of features;
                       info is one over the mean attention a token receives, so what few look at goes first
    two ways           even tokens to odd ones: half of the r that leave, each to the odd one that pulls it most;
                       then the other half: odd ones, with all that joined them, to even ones that are still there
    a merged token     the mean of its members by attention received times size; sizes add up

Differs from the paper: acts between a block's attention and its MLP, with that block's attention; the authors fuse
before attention, having looked one step ahead, and attend with the fused map. Their floor of 10 tokens is not kept, the
budget decides. The class token, registers and padding are never joined, on either way. Tokens keep the order of the
image, so from the second block on the halves are others. Nothing is fine-tuned, where the authors train with token
reduction consistency. In one place, merged tokens and sizes are those of the authors' code.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.fold import closed, gather_in, masses
from fewer.score.heads import received
from fewer.signals.heads import Attended, Heads
from fewer.types import Allocation, Budget, BudgetError, Card, Plan, Tokens

UNSEEN = 1e-12
"""Attention of a token that gets none, in half precision."""


@dataclass(frozen=True)
class MCTF:
    """Multi-criteria token fusion.

    Args:
        tau_sim: temperature of similarity: each criterion is raised to one over its own, and 0 leaves it out.
        tau_info: that of how little attention is received.
        tau_size: that of smallness.
    """

    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0

    card: ClassVar[Card] = Card(
        source="arXiv 2403.10030",
        faithfulness="paper",
        mechanism="merge",
        differs="between attention and MLP, not before attention; no fused attention map; no fine-tuning",
    )
    needs: ClassVar[frozenset[Any]] = frozenset({Heads()})
    halves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("tau_sim", "tau_info", "tau_size"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BudgetError(f"MCTF({name}={getattr(self, name)!r}): a temperature is 0, to leave out, or above")

    def places(self, layers: int) -> list[int]:
        return list(range(1, layers)) or [0]

    def score(self, tokens: Tokens) -> Tensor:
        return received(tokens.signal(Heads, Attended))

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        """What the budget says, or, where it is more, what is left when all have joined whom they can."""
        asked, free = uniform(tokens, budget), ~closed(tokens)
        even, odd = free[:, ::2].sum(-1), free[:, 1::2].sum(-1)
        most = torch.minimum(2 * odd, 2 * even - 1).clamp(min=0)  # the last even one has nobody left to join
        return replace(asked, counts=torch.maximum(asked.counts, tokens.available - most))

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        leaving = tokens.available - allocation.counts
        # what is protected stays alone, and any number does for it
        scores = torch.where(closed(tokens), 1, scores).clamp(min=UNSEEN)
        pull = self._pull(tokens, scores)
        if not pull.shape[-1]:  # a lone token has nobody on the other side
            return Plan.keep(~tokens.padding)
        towards, first, left = _drawn(pull, leaving // 2)
        back, second, _ = _drawn(left.mT, leaving - leaving // 2)
        gone = torch.zeros_like(tokens.padding)
        gone[:, ::2], gone[:, 1::2] = first, second
        partner = torch.arange(gone.shape[1], device=gone.device).repeat(len(gone), 1)
        partner[:, 1::2] = torch.where(second, 2 * back, partner[:, 1::2])
        partner[:, ::2] = torch.where(
            first, partner[:, 1::2].gather(-1, towards), partner[:, ::2]
        )  # on to where it goes
        return gather_in(tokens, Plan.keep(~gone & ~tokens.padding), partner, scores * masses(tokens))

    def _pull(self, tokens: Tokens, scores: Tensor) -> Float[Tensor, "b even odd"]:
        """The attraction of even and odd tokens, -inf where one of them may not merge.

        The authors scale info and 1/size by the row's largest, which changes no order and is left out.
        """
        unit, shut = F.normalize(tokens.features.float(), dim=-1), closed(tokens)
        pull = (unit[:, ::2] @ unit[:, 1::2].mT).add(1).div(2).clamp(min=0) ** _over(self.tau_sim)
        for one, tau in ((scores, self.tau_info), (masses(tokens), self.tau_size)):
            pull = pull / (one[:, ::2, None] * one[:, None, 1::2]) ** _over(tau)
        return pull.masked_fill(shut[:, ::2, None] | shut[:, None, 1::2], -torch.inf)


def _over(tau: float) -> float:
    return 1 / tau if tau else 0.0


def _drawn(
    pull: Float[Tensor, "b these those"], leaving: Tensor
) -> tuple[Tensor, Tensor, Float[Tensor, "b these those"]]:
    """Whom each of these is drawn to most, the `leaving` that are drawn most, and the pull without them."""
    best = pull.max(-1)
    rank = best.values.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    gone = rank < leaving.unsqueeze(-1)
    return best.indices, gone, pull.masked_fill(gone.unsqueeze(-1), -torch.inf)
