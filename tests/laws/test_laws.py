"""Every law on every method, and on a twin that breaks just that law and must be caught."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.methods import of_family, resolve
from fewer.types import Allocation, Budget, Method, Plan, Tokens
from tests.laws.battery import LAWS
from tests.laws.scene import fitted


@pytest.mark.parametrize("name", of_family("kv"))
@pytest.mark.parametrize("law", LAWS)
def test_methods_obey(law: str, name: str) -> None:
    LAWS[law](fitted(name))


@dataclass(frozen=True)
class Twin:
    """KNorm with one stage replaced."""

    scores: Callable[[Tokens, Tensor], Tensor] = lambda tokens, scores: scores
    plans: Callable[[Tokens, Plan], Plan] = lambda tokens, plan: plan
    inner: Method = field(default_factory=lambda: resolve("knorm"))
    needs: frozenset[Any] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        return self.scores(tokens, self.inner.score(tokens))

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return self.inner.allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return self.plans(tokens, self.inner.reduce(tokens, scores, allocation))


class Upcast(Plan):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x).double()


class Leaky(Plan):
    def pick(self, x: Tensor) -> Tensor:
        return super().pick(x) + x.mean(-2, keepdim=True)


def _recast(kind: type[Plan]) -> Callable[[Tokens, Plan], Plan]:
    return lambda tokens, plan: kind(plan.slot, plan.weight, plan.survivors)


def _drop_last(tokens: Tokens, plan: Plan) -> Plan:
    keep = (plan.slot >= 0) & (plan.slot < plan.counts.unsqueeze(-1) - 1)
    return Plan.keep(keep)


def _forget_protected(tokens: Tokens, plan: Plan) -> Plan:
    keep = (plan.slot >= 0) & ~tokens.protected
    spare = (~keep & ~tokens.protected & ~tokens.padding).float().cumsum(-1)
    missing = plan.counts.unsqueeze(-1) - keep.sum(-1, keepdim=True)
    return Plan.keep(keep | (~keep & ~tokens.protected & ~tokens.padding & (spare <= missing)))


def _swap(tokens: Tokens, plan: Plan) -> Plan:
    return replace(plan, survivors=plan.survivors.flip(-1))


def _lose_target(tokens: Tokens, plan: Plan) -> Plan:
    survivors = plan.survivors.clone()
    survivors[..., 0] = (plan.slot < 0).float().argmax(-1)  # slot 0 is said to be a token that was dropped
    return replace(plan, survivors=survivors)


def _write(tokens: Tokens, scores: Tensor) -> Tensor:
    tokens.features.mul_(0.5)
    return scores


TWINS: dict[str, Method] = {
    "kept_count_is_exact": Twin(plans=_drop_last),
    "protected_tokens_survive": Twin(plans=_forget_protected),
    "padding_changes_nothing": Twin(scores=lambda tokens, scores: torch.arange(scores.shape[-1]) % 7 + scores * 0),
    "keeping_all_is_the_identity": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight * (1 + 1e-6))),
    "a_row_decides_for_itself": Twin(scores=lambda tokens, scores: (scores - scores.mean(0)).abs()),
    "survivors_keep_their_order": Twin(plans=_swap),
    "inputs_are_not_modified": Twin(scores=_write),
    "dtype_is_kept": Twin(plans=_recast(Upcast)),
    "mass_is_never_created": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight * 2)),
    "restoring_loses_nothing_more": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight * 0.5)),
    "targets_survive": Twin(plans=_lose_target),
    "same_seed_same_plan": Twin(scores=lambda tokens, scores: torch.rand_like(scores)),
    "prefixes_do_not_leak": Twin(plans=_recast(Leaky)),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_broken_twin_is_caught(law: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        LAWS[law](TWINS[law])


def test_the_twins_are_sound_but_for_their_fault() -> None:
    for law in LAWS:
        LAWS[law](Twin())
