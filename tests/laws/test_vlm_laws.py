"""Every law of visual tokens on every method for them, and on a twin that breaks just that law and must be caught."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import fewer
from fewer.methods import of_family, resolve
from fewer.types import Allocation, Budget, Card, FewerError, Method, Plan, Tokens
from tests import vlms
from tests.laws.vlm_battery import LAWS, SCENES, SERVED, decide, every, place


@pytest.fixture(scope="module")
def llava() -> vlms.Case:
    return vlms.llava()


@pytest.mark.parametrize("name", [name for name in of_family("vlm") if name != "full"])
@pytest.mark.parametrize("law", LAWS)
def test_methods_obey(law: str, name: str) -> None:
    LAWS[law](resolve(name))


ALONE = [name for name in of_family("vlm") if name != "full" and "picture" in SERVED.get(name, SCENES)]


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_a_row_decides_for_itself(name: str, llava: vlms.Case) -> None:
    """What stays of a picture does not depend on the pictures of other rows."""
    both = llava.inputs([1, 1])
    with fewer.compress(llava.model, name, keep=0.4) as run:
        llava.model(**both)
        together = [row[0] for row in run.kept]
        for row in range(2):
            llava.model(**llava.row(both, row))
            assert torch.equal(run.kept[0][0], together[row])


@dataclass(frozen=True)
class Twin:
    """VisionZip with one stage replaced."""

    scores: Callable[[Tokens, Tensor], Tensor] = lambda tokens, scores: scores
    plans: Callable[[Tokens, Plan], Plan] = lambda tokens, plan: plan
    inner: Method = field(default_factory=lambda: resolve("visionzip"))
    seen: list[int] = field(default_factory=list)
    remembers: bool = False
    card: ClassVar[Card] = Card(source="a planted fault", faithfulness="own", mechanism="merge")

    @property
    def needs(self) -> frozenset[Any]:
        return self.inner.needs

    def score(self, tokens: Tokens) -> Tensor:
        scores = self.scores(tokens, self.inner.score(tokens))
        if self.remembers:
            self.seen.append(len(self.seen))
            scores = scores * torch.linspace(1, 1 + (len(self.seen) - 1), scores.shape[-1])
        return scores

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return self.inner.allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return self.plans(tokens, self.inner.reduce(tokens, scores, allocation))


class Upcast(Plan):
    def apply(self, x: Tensor) -> Tensor:
        return super().apply(x).double()


def _touching(tokens: Tokens, scores: Tensor) -> Tensor:
    tokens.features.add_(1)
    return scores


def _one_less(tokens: Tokens, plan: Plan) -> Plan:
    last = plan.slot == plan.counts.unsqueeze(-1) - 1
    return replace(plan, slot=torch.where(last, 0, plan.slot), survivors=plan.survivors[..., :-1], even=False)


def _once_each(tokens: Tokens, plan: Plan) -> Plan:
    """Of tokens that are equal to the one before, none stays: on a blank picture that is all but the first."""
    x = tokens.features[0]
    new = torch.cat([torch.ones(1, dtype=torch.bool), (x.diff(dim=0) != 0).any(-1)])
    return plan if bool(new.all()) else Plan.of(new.nonzero().T, len(x))


TWINS: dict[str, Twin] = {
    "kept_count_is_exact": Twin(plans=_one_less),
    "keeping_all_is_the_identity": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight * 1.01)),
    "same_seed_same_plan": Twin(scores=lambda tokens, scores: torch.rand(scores.shape)),
    "survivors_keep_their_order": Twin(plans=lambda tokens, plan: replace(plan, survivors=plan.survivors.flip(-1))),
    "inputs_are_not_modified": Twin(scores=_touching),
    "duplicates_do_no_harm": Twin(plans=_once_each),
    "weights_are_finite": Twin(plans=lambda tokens, plan: replace(plan, weight=plan.weight / 0)),
    "dtype_is_kept": Twin(plans=lambda tokens, plan: Upcast(plan.slot, plan.weight, plan.survivors)),
    "a_picture_decides_for_itself": Twin(remembers=True),
    "scores_are_one_number_a_token": Twin(scores=lambda tokens, scores: scores * float("nan")),
}


def test_every_law_has_a_twin() -> None:
    assert TWINS.keys() == LAWS.keys()


@pytest.mark.parametrize("law", LAWS)
def test_the_twin_is_caught(law: str) -> None:
    with pytest.raises((AssertionError, FewerError)):
        LAWS[law](TWINS[law])


def test_visionzip_itself_is_not_caught() -> None:
    for law in LAWS.values():
        law(Twin())


def test_every_scene_is_met() -> None:
    assert len(list(every(Twin()))) == len(SCENES)
    assert len(list(every(resolve("mustdrop")))) == 5 * len(SCENES)


@pytest.mark.parametrize("name", SERVED)
def test_other_scenes_are_refused(name: str) -> None:
    for scene in SCENES.keys() - set(SERVED[name]):
        with pytest.raises(FewerError):
            decide(resolve(name), place(resolve(name), SCENES[scene](), -1), 0.4)
