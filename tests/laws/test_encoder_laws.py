"""Every law of encoders on every method for them, and on a twin that breaks just that law and must be caught."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fewer.methods import of_family, resolve
from fewer.types import Allocation, Budget, Card, FewerError, Matching, Method, Plan, Tokens
from tests.laws.encoder_battery import LAWS
from tests.laws.scene import fitted


@pytest.mark.parametrize("name", [name for name in of_family("vit") if name != "full"])
@pytest.mark.parametrize("law", LAWS)
def test_methods_obey(law: str, name: str) -> None:
    LAWS[law](fitted(name))


@dataclass(frozen=True)
class Twin:
    """ToMe with one stage replaced."""

    scores: Callable[[Tokens, Matching], Matching] = lambda tokens, scores: scores
    plans: Callable[[Tokens, Plan], Plan] = lambda tokens, plan: plan
    inner: Method = field(default_factory=lambda: resolve("tome"))
    card: ClassVar[Card] = Card(source="a planted fault", faithfulness="own", mechanism="merge")

    @property
    def needs(self) -> frozenset[Any]:
        return self.inner.needs

    def score(self, tokens: Tokens) -> Matching:
        return self.scores(tokens, self.inner.score(tokens))

    def allocate(self, tokens: Tokens, scores: Matching, budget: Budget) -> Allocation:
        return self.inner.allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Matching, allocation: Allocation) -> Plan:
        return self.plans(tokens, self.inner.reduce(tokens, scores, allocation))


class Upcast(Plan):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x).double()


class Forgetful(Plan):
    def then(self, later: Any) -> Plan:
        return self._then(replace(later, weight=(later.slot >= 0).float()))


class Leaky(Plan):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x) + x.mean(-2, keepdim=True)


def _as(kind: type[Plan]) -> Callable[[Tokens, Plan], Plan]:
    return lambda tokens, plan: kind(plan.slot, plan.weight, plan.survivors, mass=plan.mass)


def _noisy(tokens: Tokens, scores: Matching) -> Matching:
    return scores._replace(value=torch.where(scores.value.isinf(), scores.value, torch.rand(scores.value.shape)))


def _by_batch(tokens: Tokens, scores: Matching) -> Matching:
    """Ranks against the other rows: a token's worth depends on who is beside it."""
    own = tokens.features.float().sum(-1)
    value = torch.where(scores.value.isinf(), scores.value, (own - own.mean(0)).abs() + own * own.mean())
    return scores._replace(value=value)


def _by_padding(tokens: Tokens, scores: Matching) -> Matching:
    x = tokens.features.float()
    far = x.sum(-1) - x.mean((-1, -2)).unsqueeze(1)  # of padding too
    return scores._replace(value=torch.where(scores.value.isinf(), scores.value, far.abs() % 0.1))


def _touching(tokens: Tokens, scores: Matching) -> Matching:
    tokens.features.add_(1)
    return scores


def _one_less(tokens: Tokens, plan: Plan) -> Plan:
    last = plan.slot == plan.counts.unsqueeze(-1) - 1
    return replace(plan, slot=torch.where(last, 0, plan.slot), survivors=plan.survivors[..., :-1], mass=None)


def _joining_the_first(tokens: Tokens, plan: Plan) -> Plan:
    home = torch.zeros_like(plan.slot, dtype=torch.bool).scatter(-1, plan.survivors.clamp(min=0), True)
    return replace(plan, slot=torch.where(home, plan.slot, 0), mass=None)


TWINS: dict[str, Twin] = {
    "kept_count_is_exact": Twin(plans=_one_less),
    "protected_tokens_survive": Twin(plans=_joining_the_first),
    "padding_changes_nothing": Twin(scores=_by_padding),
    "keeping_all_is_the_identity": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight * 1.01)),
    "a_row_decides_for_itself": Twin(scores=_by_batch),
    "survivors_keep_their_order": Twin(plans=lambda tokens, plan: replace(plan, survivors=plan.survivors.flip(-1))),
    "inputs_are_not_modified": Twin(scores=_touching),
    "dtype_is_kept": Twin(plans=_as(Upcast)),
    "mass_is_conserved": Twin(plans=lambda tokens, plan: replace(plan, mass=None)),
    "restoring_loses_nothing_more": Twin(plans=_as(Leaky)),
    "group_constant_input_comes_back": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight * 0.9)),
    "plans_compose": Twin(plans=_as(Forgetful)),
    "same_seed_same_plan": Twin(scores=_noisy),
}


def test_every_law_has_a_twin() -> None:
    assert TWINS.keys() == LAWS.keys()


@pytest.mark.parametrize("law", LAWS)
def test_the_twin_is_caught(law: str) -> None:
    with pytest.raises((AssertionError, FewerError)):
        LAWS[law](TWINS[law])


def test_tome_itself_is_not_caught() -> None:
    for law in LAWS.values():
        law(Twin())
