"""The laws of methods for encoders, one function each. A law takes a method and raises if the method breaks it."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch

from fewer.types import Method, Plan, Reduction, Tokens
from tests.methods.vit import build
from tests.methods.vit.build import groups, kept, place

KEEP = 0.7  # of 36 patches at most half can leave in pairs; here methods have a choice
GRID = (6, 6)
N = 37


def decide(method: Method, tokens: Tokens, keep: float | int = KEEP) -> Reduction:
    return build.decide(method, tokens, keep)


def _merges(method: Method) -> bool:
    return type(method).card.mechanism == "merge"


def kept_count_is_exact(method: Method) -> None:
    for keep in (0.5, 0.7, 20):
        plan = decide(method, place(N, grid=GRID), keep)
        asked = 1 + (keep if isinstance(keep, int) else -int(-keep * 36 // 1))
        if getattr(method, "exact", True):
            assert plan.counts.tolist() == [asked, asked]
        elif getattr(method, "floor", False):  # the budget is the least that stays
            assert bool((plan.counts >= asked).all())
        else:
            assert bool((plan.counts <= asked).all())


def protected_tokens_survive(method: Method) -> None:
    grids = getattr(method, "grids", False)  # then there are as many patches as the grid says, none of them protected
    plan = decide(method, place(N + 2 * grids, grid=GRID, prefix=3, protect=() if grids else (7, 20)))
    for row in range(2):
        assert {0, 1, 2} <= set(kept(plan, row))
        if not grids:
            assert {7, 20} <= set(kept(plan, row))
        for member in groups(plan, row)[:3]:
            assert len(member) == 1, "nobody joins a class or register token"


def padding_changes_nothing(method: Method) -> None:
    if getattr(method, "grids", False):
        return  # a grid has no padding
    long = place(41, rows=2, lengths=[41, 30], seed=3)
    cut = {name: getattr(long.signals[_heads()], name)[1:, :, :30] for name in ("query", "key", "value")}
    alone = place(30, rows=1, features=long.features[1:, :30], **cut)
    padded, single = decide(method, long), decide(method, alone)
    assert groups(padded, 1) == groups(single)
    assert bool((padded.assign[1, 30:] < 0).all())


def _heads() -> type:
    from fewer.signals.heads import Heads

    return Heads


def keeping_all_is_the_identity(method: Method) -> None:
    tokens = place(N, grid=GRID)
    plan = decide(method, tokens, 1.0)
    for out in (plan.pick(tokens.features), plan.apply(tokens.features), plan.restore(tokens.features)):
        assert torch.equal(out, tokens.features), "bit for bit"


def a_row_decides_for_itself(method: Method) -> None:
    batch = place(N, rows=3, grid=GRID, seed=5)
    plan = decide(method, batch)
    for row in range(3):
        own = batch.signals[_heads()]
        alone = place(
            N, rows=1, grid=GRID, features=batch.features[row : row + 1], query=own.query[row : row + 1],
            key=own.key[row : row + 1], value=own.value[row : row + 1],
        )  # fmt: skip
        single = decide(method, alone)
        assert groups(plan, row) == groups(single)
        torch.testing.assert_close(
            plan.apply(batch.features)[row, : int(single.counts[0])], single.apply(alone.features)[0]
        )


def survivors_keep_their_order(method: Method) -> None:
    plan = decide(method, place(N, grid=GRID))
    for row in range(2):
        assert kept(plan, row) == sorted(set(kept(plan, row)))


def inputs_are_not_modified(method: Method) -> None:
    tokens = place(N, grid=GRID, mass=torch.rand(2, N).add(1).round())
    before = copy.deepcopy(tokens)
    decide(method, tokens)
    for name in ("features", "values", "positions", "padding", "protected", "seen", "mass"):
        assert torch.equal(getattr(tokens, name), getattr(before, name)), name
    for name in ("query", "key", "value", "bias"):
        assert torch.equal(getattr(tokens.signals[_heads()], name), getattr(before.signals[_heads()], name)), name


def dtype_is_kept(method: Method) -> None:
    tokens = place(N, grid=GRID, dtype=torch.bfloat16)
    plan = decide(method, tokens)
    assert plan.pick(tokens.features).dtype == plan.apply(tokens.features).dtype == torch.bfloat16


def mass_is_conserved(method: Method) -> None:
    """Merging keeps all mass; pruning and what discounts may lose some; nobody makes any."""
    mass = torch.randint(1, 4, (2, N)).float()
    plan = decide(method, place(N, grid=GRID, mass=mass))
    now = mass.gather(-1, plan.survivors.clamp(min=0)) if plan.mass is None else plan.mass
    total = now.masked_fill(plan.survivors < 0, 0).sum(-1)
    if _merges(method):
        torch.testing.assert_close(total, mass.sum(-1))
    assert bool((total <= mass.sum(-1) + 1e-3).all())


def restoring_loses_nothing_more(method: Method) -> None:
    tokens = place(N, grid=GRID)
    plan = decide(method, tokens)
    if isinstance(plan, Plan):
        once = plan.apply(tokens.features)
        back = plan.restore(once, "pinv")
        torch.testing.assert_close(plan.apply(back), once, atol=1e-4, rtol=1e-4)


def group_constant_input_comes_back(method: Method) -> None:
    """Where all members of a slot are alike, merging and copying back is the identity."""
    if not _merges(method):
        return
    tokens = place(N, grid=GRID)
    plan = decide(method, tokens)
    if not isinstance(plan, Plan) or getattr(method, "rescales", False):
        return
    alike = plan.restore(plan.pick(tokens.features))
    torch.testing.assert_close(plan.restore(plan.apply(alike)), alike, atol=1e-5, rtol=1e-5)


def plans_compose(method: Method) -> None:
    """Two steps are one: the composed plan gives what the plans give in turn."""
    if getattr(method, "grids", False):
        return
    tokens = place(N, grid=GRID)
    first = decide(method, tokens, 0.7)
    x = first.apply(tokens.features)
    k = x.shape[1]
    mass = None if first.mass is None else first.mass
    second = decide(method, replace(place(k, seed=9, mass=mass), features=x), 0.6)
    torch.testing.assert_close(first.then(second).apply(tokens.features), second.apply(x), atol=1e-4, rtol=1e-4)


def same_seed_same_plan(method: Method) -> None:
    tokens = place(N, grid=GRID)
    first = decide(method, tokens)
    torch.rand(7)  # the global generator moves on; plans must not notice
    again = decide(method, tokens)
    assert torch.equal(first.assign, again.assign)
    assert torch.equal(first.apply(tokens.features), again.apply(tokens.features))


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
        mass_is_conserved,
        restoring_loses_nothing_more,
        group_constant_input_comes_back,
        plans_compose,
        same_seed_same_plan,
    )
}
