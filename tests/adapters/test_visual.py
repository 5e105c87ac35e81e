"""Visual tokens of every family: what is really removed is what a mask would hide, and leaving changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.types import BudgetError, FewerError, UnsupportedModel
from tests import vlms

CLOSE = 1e-4
FAMILIES = list(vlms.FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> vlms.Case:
    return vlms.FAMILIES[request.param]()


@torch.no_grad()
def emulated(model: Any, inputs: dict[str, Tensor], run: Any) -> Tensor:
    """Logits of the model, whole, where later layers are kept from seeing what the run dropped, and folded states are
    put in place of those they replace. Nothing here cuts anything."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    b, q = ids.shape
    blocks = model.base_model.get_submodule(_text(model)).layers
    gone = torch.zeros(len(blocks), b, q, dtype=torch.bool)
    folds: dict[int, list[tuple[int, Tensor, Any]]] = {}
    alive = {
        (row, n): torch.arange(len(one.columns)) for row, each in enumerate(run.pictures) for n, one in enumerate(each)
    }
    for after, row, number, plan in run.plan:
        mine = [number] if number >= 0 else list(range(len(run.pictures[row])))
        columns = torch.cat([run.pictures[row][n].columns[alive[row, n]] for n in mine])
        survivors = plan.survivors[0][plan.survivors[0] >= 0]
        folds.setdefault(after + 1, []).append((row, columns, plan))
        dropped = torch.ones(len(columns), dtype=torch.bool)
        dropped[survivors] = False
        gone[after + 1 :, row, columns[dropped]] = True
        first = 0
        for n in mine:
            stays = ~dropped[first : first + len(alive[row, n])]
            first += len(alive[row, n])
            alive[row, n] = alive[row, n][stays]
        for n in range(len(run.pictures[row])):
            gone[after + 1 :, row, run.pictures[row][n].separators] = True

    def before(index: int, block: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs.pop("hidden_states", args[0] if args else None).clone()
        for row, columns, plan in folds.get(index, ()):
            survivors = plan.survivors[0][plan.survivors[0] >= 0]
            states[row, columns[survivors]] = plan.apply(states[row, columns].unsqueeze(0))[0, : len(survivors)]
        hidden = ~torch.ones(q, q, dtype=torch.bool).tril() | (gone[index] | ~mask)[:, None]
        hidden &= ~torch.eye(q, dtype=torch.bool)
        full = torch.zeros(b, 1, q, q).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
        return (states,), kwargs | {"attention_mask": full}

    def deep(text: Any, args: Any, kwargs: Any) -> Any:
        """What the first layers add to visual tokens folds as their states do."""
        shown, each = kwargs.get("visual_pos_masks"), list(kwargs.get("deepstack_visual_embeds") or ())
        for index, embeds in enumerate(each):
            wide = torch.zeros(b, q, embeds.shape[-1])
            wide[shown] = embeds
            for row, columns, plan in [one for at, some in folds.items() if at <= index for one in some]:
                survivors = plan.survivors[0][plan.survivors[0] >= 0]
                wide[row, columns[survivors]] = plan.apply(wide[row, columns].unsqueeze(0))[0, : len(survivors)]
            each[index] = wide[shown]
        return args, kwargs | ({"deepstack_visual_embeds": each} if each else {})

    text = model.base_model.get_submodule(_text(model))
    hooks = [text.register_forward_pre_hook(deep, with_kwargs=True)] + [
        block.register_forward_pre_hook(lambda m, a, k, i=i: before(i, m, a, k), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    try:
        return model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def _text(model: Any) -> str:
    return "language_model" if hasattr(model.base_model, "language_model") else "text_model"


def _close(run: Any, got: Tensor, model: Any, inputs: dict[str, Tensor]) -> None:
    expected = emulated(model, inputs, run)
    there = inputs["attention_mask"].bool() & (inputs["input_ids"] != vlms.IMAGE) & (inputs["input_ids"] != vlms.VIDEO)
    assert there.any()
    worst = float((got[there] - expected[there]).abs().max())
    assert worst < CLOSE, f"real removal differs from the mask by {worst}"


class Merging:
    """Folds pairs of neighbours: a method that a user might write."""

    needs: frozenset[Any] = frozenset()

    def after(self, layers: int) -> tuple[int, ...]:
        return (-1, 1)

    def score(self, tokens: fewer.Tokens) -> Tensor:
        return tokens.features.norm(dim=-1)

    def allocate(self, tokens: fewer.Tokens, scores: Tensor, budget: fewer.Budget) -> fewer.Allocation:
        return fewer.Allocation(torch.tensor([budget.count(int(tokens.seen[0]))]))

    def reduce(self, tokens: fewer.Tokens, scores: Tensor, allocation: fewer.Allocation) -> fewer.Plan:
        n, k = scores.shape[-1], int(allocation.counts)
        slot = (torch.arange(n) * k // n).unsqueeze(0)
        survivors = torch.searchsorted(slot[0], torch.arange(k)).unsqueeze(0)
        share = 1 / torch.bincount(slot[0]).float()
        return fewer.Plan(slot, share[slot[0]].unsqueeze(0), survivors)


@pytest.mark.parametrize("method", ["random", "fastv", Merging()], ids=["random", "fastv", "merging"])
@pytest.mark.parametrize("counts", [[1], [2, 1]], ids=["one", "batch"])
@torch.no_grad()
def test_real_removal_is_the_mask(case: vlms.Case, method: Any, counts: list[int]) -> None:
    inputs = case.inputs(counts)
    with fewer.compress(case.model, method, keep=0.4) as run:
        got = case.model(**inputs).logits
    assert len(run.plan) >= sum(counts)
    _close(run, got, case.model, inputs)


@torch.no_grad()
def test_generating_goes_on_as_under_the_mask(case: vlms.Case) -> None:
    inputs = case.inputs([2, 1])
    with fewer.compress(case.model, "fastv", keep=0.4) as run:
        answer = case.model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    told = dict(inputs)
    for step in range(4):
        logits = emulated(case.model, told, run)[:, -1]
        assert logits.argmax(-1).tolist() == answer[:, inputs["input_ids"].shape[1] + step].tolist()
        new = answer[:, : inputs["input_ids"].shape[1] + step + 1]
        more = torch.ones(len(new), step + 1, dtype=torch.long)
        told = told | {"input_ids": new, "attention_mask": torch.cat([inputs["attention_mask"], more], 1)}
        if "mm_token_type_ids" in inputs:
            told["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)


@torch.no_grad()
def test_keeping_all_and_leaving_are_bit_exact(case: vlms.Case) -> None:
    inputs = case.inputs([1, 2])
    there = inputs["attention_mask"].bool()
    before = case.model(**inputs).logits
    with fewer.compress(case.model, "fastv", keep=1.0):
        assert torch.equal(case.model(**inputs).logits[there], before[there])
    with fewer.compress(case.model, "visionzip" if case.classes else "random", keep=3):
        case.model(**inputs)
    assert torch.equal(case.model(**inputs).logits, before)
    names = [name for name in vars(case.model.base_model) if name.startswith("get_")]
    assert not names, "the model's own functions are back"


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(case: vlms.Case) -> None:
    for side in ("left", "right"):
        both = case.inputs([1, 1], side=side)
        with fewer.compress(case.model, "fastv", keep=0.3) as run:
            got = case.model(**both).logits
        kept = run.kept
        for row in (0, 1):
            there = both["attention_mask"][row].bool()
            alone = case.row(both, row)
            with fewer.compress(case.model, "fastv", keep=0.3) as run:
                own = case.model(**alone).logits
            assert torch.equal(run.kept[0][0], kept[row][0])
            torch.testing.assert_close(own[0], got[row][there], atol=CLOSE, rtol=0, equal_nan=True)
