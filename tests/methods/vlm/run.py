"""One decision, and one forward of a tiny model, for the tests of methods."""

from typing import Any

import torch

import fewer
from fewer.compress import step
from fewer.types import Budget, Plan, Tokens
from tests import vlms


def decide(method: Any, tokens: Tokens, keep: int) -> Plan:
    plan: Plan = step(method, Budget(keep, tokens=keep), tokens)
    return plan


def kept(method: Any, tokens: Tokens, keep: int) -> list[int]:
    """The tokens that stay, in their order."""
    found: list[int] = decide(method, tokens, keep).survivors[0].tolist()
    return found


@torch.no_grad()
def through(family: str, method: Any, keep: float = 0.4) -> list[tuple[int, int]]:
    """A tiny model reads two rows of one and two pictures; after which layers each is cut, and to how many."""
    case = vlms.FAMILIES[family]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, method, keep=keep) as run:
        logits = case.model(**inputs).logits
    assert bool(logits[:, -1].isfinite().all())
    sizes = [len(one.columns) for row in run.pictures for one in row]
    kept = [len(one) for row in run.kept for one in row]
    assert kept == [fewer.Budget.parse(keep).count(size) for size in sizes]
    return [(after, int(plan.counts)) for after, _, _, plan in run.plan]
