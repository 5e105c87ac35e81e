"""Methods inside other methods: which they are, what they say for the whole, and which a method around would spoil.

AdaKV(SnapKV())    whoever is outside asks the one inside for its four members, and replaces some of them
"""

from collections.abc import Iterator
from typing import Any

import torch

from fewer.reduce.select import top_k
from fewer.types import Allocation, FewerError, Method, MissingSignal, Plan, Tokens

FORWARD = ("shortens", "among", "reads")
"""What a method says beside its four members if it changes the forward itself, and not just what is kept of it."""
OTHERWISE = (*FORWARD, "pairs", "whole")
"""The same if it does more to a cache than evict from it; and its `store`."""


def inside(method: Any) -> Iterator[Any]:
    """The methods that a method holds in its fields, innermost first, and the method itself."""
    for part in getattr(method, "__dict__", {}).values():
        if isinstance(part, Method):
            yield from inside(part)
    yield method


def published(method: Any) -> tuple[str, int]:
    """When a method acts, and after how many decoding steps: what it says, or one inside it, or "prefill" and 64."""
    parts = [*inside(method)][::-1]  # the outermost first
    when: str = next((part.when for part in parts if hasattr(part, "when")), "prefill")
    every: int = next((part.every for part in parts if hasattr(part, "every")), 64)
    return when, every


def changes_forward(method: Any) -> bool:
    """Whether no other method's forward can stand in for one with this."""
    return any(getattr(method, member, None) is not None for member in FORWARD)


def evicts(method: Any) -> bool:
    """Whether all that a method does to a cache is to evict from it, or to merge."""
    plain = getattr(method, "store", (None,)) == (None,)
    return plain and not any(getattr(method, member, None) for member in OTHERWISE)


def must_evict(outer: Any, method: Any) -> None:
    """Raise `FewerError` if a method around this one would lose what else it does to a cache."""
    if not evicts(method):
        raise FewerError(
            f"{type(method).__name__} does more to a cache than evict from it, and {type(outer).__name__} around it "
            f"would lose that; put a method inside that only evicts, such as SnapKV(), and pack what it keeps with "
            f"store=..."
        )


def must_keep_the_top(outer: Any, method: Any) -> None:
    """Raise `FewerError` if a method's plan is more than the top of its scores, for those who only ask for these."""
    if not _keeps_the_top(method):
        raise FewerError(
            f"{type(method).__name__} does not just keep its highest scores: it also goes by what is recent, merges or "
            f"moves keys, and {type(outer).__name__} around it would lose that; put a method inside whose scores say "
            f"it all, such as SnapKV() or AdaKV()"
        )


def _keeps_the_top(method: Any) -> bool:
    """Tried out: tokens with scores in no order, of which half stay."""
    n = 64
    at, none, ones = torch.arange(n).view(1, 1, n), torch.zeros(1, 1, n, dtype=torch.bool), torch.ones(1, 1, n, 2)
    tokens, scores = Tokens(ones, at, none, none, torch.tensor([n]), values=ones), (at * 27 % n).float()
    allocation = Allocation(torch.tensor([[n // 2]]))
    try:
        plan, top = method.reduce(tokens, scores, allocation), top_k(scores, allocation)
    except MissingSignal:  # it looks at more than scores
        return False
    if not isinstance(plan, Plan) or any(part is not None for part in (plan.moved, plan.mass, plan.tier)):
        return False
    return torch.equal(plan.slot, top.slot) and torch.equal(plan.weight, top.weight)
