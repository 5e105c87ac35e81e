"""The laws of methods for visual tokens, one function each. A law takes a method and raises if the method breaks it.

Every law is put to a method at each of its cuts, and in each of the scenes that it serves.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewer.compress import step
from fewer.methods import name_of
from fewer.signals.visual import Layout, Looked, Places, Question, TextAttention, Tower, Vocabulary
from fewer.types import Budget, Method, Plan, Reduction, Site, Tokens
from tests.methods.vlm.build import lay, random, view
from tests.methods.vlm.look import look

LAYERS, WIDE = 32, 8
"""Depth of the language model, and width of its states."""


def _halves() -> Tensor:
    return torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0.5, 0.5, 1, 1]])


def picture() -> Layout:
    return lay([(6, 8)], (0,))


def crops() -> Layout:
    """A whole view, and four crops."""
    return lay([(4, 4)] * 5, (0,), _halves())


def video() -> Layout:
    return replace(lay([(4, 4)] * 4), video=True)


def prompt() -> Layout:
    """All pictures of a prompt as one."""
    return Layout.join([crops(), crops()])


def later() -> Layout:
    """What an earlier cut has left of a picture, in no order that a grid knows."""
    return picture().take(torch.tensor([j for j in range(48) if j % 7 not in (1, 4)]))


SCENES: dict[str, Callable[[], Layout]] = {one.__name__: one for one in (picture, crops, video, prompt, later)}


SERVED: dict[str, tuple[str, ...]] = {
    "evs": ("video",),
    "dycoke": ("video",),
    "globalcom2": ("picture", "crops", "later", "prompt"),
}
"""Methods that compare frames, or crops with a whole, refuse all other scenes."""


def served(method: Any) -> tuple[str, ...]:
    """The scenes that a method serves; those that need a whole grid serve pictures alone."""
    return ("picture",) if getattr(method, "grids", False) else SERVED.get(name_of(method), tuple(SCENES))


def cuts(method: Any) -> tuple[int, ...]:
    asked = getattr(method, "after", None)
    return (-1,) if asked is None else tuple(asked(LAYERS))


def place(method: Any, layout: Layout, after: int, *, seed: int = 0, features: Tensor | None = None) -> Tokens:
    """Tokens there, with all that the method asks for."""
    n = len(layout)
    features = random(1, n, WIDE, seed=seed) if features is None else features
    signals: dict[type, Any] = {}
    for need in method.needs:
        if isinstance(need, Places):
            signals[Places] = layout
        elif isinstance(need, Tower):
            signals[Tower] = view(n, seed=seed)
        elif isinstance(need, Question):
            signals[Question] = random(1, 5, WIDE, seed=seed + 600)
        elif isinstance(need, Vocabulary):
            signals[Vocabulary] = random(40, WIDE, seed=700)
        elif isinstance(need, TextAttention):
            if after >= 0:
                signals[TextAttention] = look(n, hidden=WIDE, seed=seed)
        else:
            raise NotImplementedError(f"the laws know no {type(need).__name__}: gather it here")
    places = cuts(method)
    none = torch.zeros(1, n, dtype=torch.bool)
    site = Site(after, LAYERS, "prefill", 0, layout.grid, places.index(after), len(places))
    return Tokens(
        features, torch.arange(n).unsqueeze(0), none, none.clone(), torch.tensor([n]), signals=signals, site=site
    )


def every(method: Any, **more: Any) -> Iterator[Tokens]:
    """Tokens in every scene that the method serves, at every cut."""
    for name in served(method):
        for after in cuts(method):
            yield place(method, SCENES[name](), after, **more)


def decide(method: Method, tokens: Tokens, keep: float | int) -> Reduction:
    found: Reduction = step(method, _budget(keep), tokens)
    return found


def _budget(keep: float | int) -> Budget:
    return Budget(1, tokens=1) if isinstance(keep, int) and keep == 1 else Budget.parse(keep)


def same(a: Reduction, b: Reduction, x: Tensor) -> bool:
    return (
        torch.equal(a.assign, b.assign)
        and torch.equal(a.survivors, b.survivors)
        and torch.equal(a.apply(x), b.apply(x))
    )


def kept_count_is_exact(method: Method) -> None:
    for tokens in every(method):
        n = tokens.features.shape[1]
        for keep in (1, 2, 3, 7, 0.1, 0.25, 0.5, 0.9, n - 1):
            counts, count = decide(method, tokens, keep).counts, _budget(keep).count(n)
            assert counts.tolist() == [count] if getattr(method, "exact", True) else 1 <= int(counts) <= count


def keeping_all_is_the_identity(method: Method) -> None:
    for tokens in every(method):
        plan = decide(method, tokens, 1.0)
        for out in (plan.pick(tokens.features), plan.apply(tokens.features), plan.restore(tokens.features)):
            assert torch.equal(out, tokens.features), "bit for bit"


def same_seed_same_plan(method: Method) -> None:
    for tokens in every(method):
        first = decide(method, tokens, 0.4)
        torch.rand(7)  # the global generator moves on; plans must not notice
        assert same(first, decide(method, tokens, 0.4), tokens.features)


def survivors_keep_their_order(method: Method) -> None:
    for tokens in every(method):
        plan = decide(method, tokens, 0.4)
        index = plan.survivors[0].tolist()
        assert index == sorted(set(index)) and index[0] >= 0 and index[-1] < tokens.features.shape[1]


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for one in thing.values():
            yield from _tensors(one)
    elif is_dataclass(thing):
        for one in fields(thing):
            yield from _tensors(getattr(thing, one.name))


def inputs_are_not_modified(method: Method) -> None:
    for tokens in every(method):
        before = copy.deepcopy(tokens)
        decide(method, tokens, 0.4)
        now, then = list(_tensors(tokens)), list(_tensors(before))
        assert len(now) == len(then) > 4
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def duplicates_do_no_harm(method: Method) -> None:
    """A blank picture: all tokens, and all that is said of them, are the same."""
    for tokens in every(method):
        n = tokens.features.shape[1]
        signals = dict(tokens.signals)
        for need, value in signals.items():
            if need is Tower:
                signals[need] = value.take(torch.zeros(n, dtype=torch.long))
            elif isinstance(value, Looked):
                plain, key = value.plain_key.clone(), value.key.clone()
                plain[:, value.visual] = key[:, value.visual] = plain[:, value.visual[:1]]
                signals[need] = replace(value, plain_key=plain, key=key)
        for x in (torch.ones(1, n, WIDE), torch.zeros(1, n, WIDE)):
            blank = replace(tokens, features=x, signals=signals)
            for keep in (2, 0.3, n - 1):
                plan = decide(method, blank, keep)
                assert plan.apply(x).isfinite().all()
                if getattr(method, "exact", True):
                    assert plan.counts.tolist() == [_budget(keep).count(n)]


def weights_are_finite(method: Method) -> None:
    """And no slot is empty, or goes without its survivor's own place."""
    for tokens in every(method):
        plan = decide(method, tokens, 0.3)
        weights = plan.weight if isinstance(plan, Plan) else plan.matrix
        assert weights.isfinite().all()
        assert plan.apply(tokens.features).isfinite().all()
        if isinstance(plan, Plan):
            taken = plan.slot[plan.slot >= 0].bincount(weights[plan.slot >= 0].abs(), minlength=int(plan.counts))
            assert bool((taken > 0).all())
        if plan.mass is not None:
            assert bool((plan.mass > 0).all()) and plan.mass.isfinite().all()


def dtype_is_kept(method: Method) -> None:
    for tokens in every(method):
        half = replace(tokens, features=tokens.features.bfloat16())
        plan = decide(method, half, 0.4)
        assert plan.pick(half.features).dtype == plan.apply(half.features).dtype == torch.bfloat16


def a_picture_decides_for_itself(method: Method) -> None:
    """Nothing is remembered of the pictures that came before."""
    for tokens, other in zip(every(method), every(method, seed=31), strict=True):
        alone = decide(copy.deepcopy(method), tokens, 0.4)
        own = copy.deepcopy(method)
        for keep in (0.2, 0.4, 9):
            decide(own, other, keep)
        assert same(alone, decide(own, tokens, 0.4), tokens.features)


def scores_are_one_number_a_token(method: Method) -> None:
    for tokens in every(method):
        scores = method.score(tokens)
        assert isinstance(scores, Tensor) and scores.shape == tokens.positions.shape
        assert scores.is_floating_point() and not scores.isnan().any()


LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        kept_count_is_exact,
        keeping_all_is_the_identity,
        same_seed_same_plan,
        survivors_keep_their_order,
        inputs_are_not_modified,
        duplicates_do_no_harm,
        weights_are_finite,
        dtype_is_kept,
        a_picture_decides_for_itself,
        scores_are_one_number_a_token,
    )
}
