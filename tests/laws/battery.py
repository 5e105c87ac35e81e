"""The laws, one function each. A law takes a method and raises if the method breaks it."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from fewer.compress import step
from fewer.types import Budget, Method, Plan, Site, Tokens
from tests.gather import together
from tests.laws.scene import KV_HEADS, rows, scene

LENGTHS = (90, 131, 200)
KEEP = 0.8  # enough for the default windows to fit beside something to choose from


def kept_positions(tokens: Tokens, plan: Plan, row: int = 0) -> list[list[int]]:
    """For each head, the positions that survive in a row."""
    there = plan.survivors[row] >= 0
    found = tokens.positions[row].gather(-1, plan.survivors[row].clamp(min=0))
    return [found[head][there[head]].tolist() for head in range(found.shape[0])]


def decide(method: Method, tokens: Tokens, keep: float | int = KEEP) -> Plan:
    return step(method, Budget.parse(keep), tokens)


def kept_count_is_exact(method: Method) -> None:
    layers = 4
    for n in LENGTHS:
        total, budget = 0, Budget.parse(KEEP)
        places = [scene(method, rows([n], seed=layer), site=Site(layer, layers)) for layer in range(layers)]
        for tokens in together(method, places):
            scores = torch.where(tokens.padding, -torch.inf, method.score(tokens))
            asked = method.allocate(tokens, scores, budget).counts
            plan = method.reduce(tokens, scores, method.allocate(tokens, scores, budget))
            assert torch.equal(plan.counts, asked), "the plan keeps what was allocated"
            total += int(plan.counts.sum())
        everything = n * KV_HEADS * layers
        assert total in (Budget.parse(KEEP).count(n) * KV_HEADS * layers, everything), "the total is the budget"


def protected_tokens_survive(method: Method) -> None:
    tokens = scene(method, rows([120]), protect=(5, 17, 40))
    plan = decide(method, tokens)
    for head in kept_positions(tokens, plan):
        assert {5, 17, 40} <= set(head)


def padding_changes_nothing(method: Method) -> None:
    alone = scene(method, rows([90]))
    padded = scene(method, [*rows([90]), *rows([1, 170])[1:]])
    plan = decide(method, padded)
    plan.check(padded.padding)
    assert kept_positions(alone, decide(method, alone)) == kept_positions(padded, plan)


def keeping_all_is_the_identity(method: Method) -> None:
    tokens = scene(method, rows([100]))
    plan = decide(method, tokens, 1.0)
    for out in (plan.pick(tokens.features), plan.apply(tokens.features), plan.restore(tokens.features)):
        assert torch.equal(out, tokens.features), "bit for bit"


def a_row_decides_for_itself(method: Method) -> None:
    parts = rows(LENGTHS)
    batch = scene(method, parts)
    plan = decide(method, batch)
    for row, part in enumerate(parts):
        alone = scene(method, [part])
        assert kept_positions(alone, decide(method, alone)) == kept_positions(batch, plan, row)


def survivors_keep_their_order(method: Method) -> None:
    tokens = scene(method, rows([150]))
    for head in kept_positions(tokens, decide(method, tokens)):
        assert head == sorted(head) and len(head) == len(set(head))


def inputs_are_not_modified(method: Method) -> None:
    tokens = scene(method, rows([100, 140]))
    before = copy.deepcopy(tokens)
    decide(method, tokens)
    for name in ("features", "values", "positions", "padding", "protected", "seen"):
        assert torch.equal(getattr(tokens, name), getattr(before, name)), name
    for need, value in tokens.signals.items():
        assert _same(value, before.signals[need]), need


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    fields = getattr(a, "__dataclass_fields__", {})
    return all(_same(getattr(a, name), getattr(b, name)) for name in fields)


def dtype_is_kept(method: Method) -> None:
    tokens = scene(method, rows([100]), dtype=torch.bfloat16)
    plan = decide(method, tokens)
    assert plan.pick(tokens.features).dtype == plan.apply(tokens.features).dtype == torch.bfloat16
    assert plan.pick(tokens.features).device == tokens.features.device


def mass_is_never_created(method: Method) -> None:
    tokens = scene(method, rows([130]))
    ones = torch.ones_like(tokens.features[..., :1])
    for keep in (KEEP, 1.0):
        plan = decide(method, tokens, keep)
        into = torch.zeros(*plan.survivors.shape).scatter_add(-1, plan.slot.clamp(min=0), (plan.slot >= 0).float())
        assert bool((plan.apply(ones)[..., 0] <= into + 1e-5).all()), "no slot weighs more than its members"
        if int(plan.counts.sum()) == int(tokens.available.sum()):
            assert torch.allclose(plan.apply(ones).sum(), ones.sum()), "and nothing is lost where nothing is dropped"


def restoring_loses_nothing_more(method: Method) -> None:
    tokens = scene(method, rows([130]))
    plan = decide(method, tokens)
    once = plan.apply(tokens.features)
    assert torch.allclose(plan.apply(plan.restore(once)), once, atol=1e-6)


def targets_survive(method: Method) -> None:
    tokens = scene(method, rows([130]))
    plan = decide(method, tokens)
    target = plan.survivors.gather(-1, plan.slot.clamp(min=0))
    landed = plan.slot.gather(-1, target.clamp(min=0))
    assert bool((landed == plan.slot)[plan.slot >= 0].all())


def same_seed_same_plan(method: Method) -> None:
    tokens = scene(method, rows([130]))
    first = decide(method, tokens)
    torch.rand(7)  # the global generator moves on; plans must not notice
    again = decide(method, tokens)
    assert torch.equal(first.slot, again.slot) and torch.equal(first.weight, again.weight)


def prefixes_do_not_leak(method: Method) -> None:
    """Dropped tokens are really gone: the plan says -1 for them and no slot holds them."""
    tokens = scene(method, rows([130]))
    plan = decide(method, tokens)
    dropped = plan.slot < 0
    marked = tokens.features.masked_fill(dropped.unsqueeze(-1), torch.nan)
    assert not bool(plan.apply(torch.where(dropped.unsqueeze(-1), 0, marked)).isnan().any())
    assert not bool(plan.pick(marked).isnan().any())


LAWS: dict[str, Callable[[Method], None]] = {
    law.__name__: law
    for law in (
        kept_count_is_exact,
        protected_tokens_survive,
        padding_changes_nothing,
        keeping_all_is_the_identity,
        a_row_decides_for_itself,
        survivors_keep_their_order,
        inputs_are_not_modified,
        dtype_is_kept,
        mass_is_never_created,
        restoring_loses_nothing_more,
        targets_survive,
        same_seed_same_plan,
        prefixes_do_not_leak,
    )
}
