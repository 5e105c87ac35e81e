"""Top-k of rows, of columns and of all, against a loop."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.allocate.scopes import winners
from fewer.types import BudgetError, FewerError

SCOPES: list[Any] = ["token", "feature", "global"]


def naive(scores: Tensor, k: int, scope: str) -> Tensor:
    """One contest at a time, sorted by score and then by place."""
    out = torch.zeros_like(scores, dtype=torch.bool)
    *lead, n, f = scores.shape
    for at in product(*map(range, lead)):
        every = [(i, j) for i in range(n) for j in range(f)]
        contests = {
            "token": [[c for c in every if c[0] == i] for i in range(n)],
            "feature": [[c for c in every if c[1] == j] for j in range(f)],
            "global": [every],
        }[scope]
        for contest in contests:
            best = sorted(contest, key=lambda c: (-float(scores[(*at, *c)]), c))
            for place in best[:k]:
                out[(*at, *place)] = True
    return out


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 6), (2, 2, 4, 5)])
def test_agrees_with_a_loop(scope: Any, shape: tuple[int, ...]) -> None:
    for k in (0, 1, 3):
        for scores in (torch.randn(shape), torch.randint(0, 3, shape).float()):  # the second is full of ties
            before = scores.clone()
            found = winners(scores, k, scope)
            assert torch.equal(found, naive(scores, k, scope))
            assert torch.equal(scores, before)
            each = {"token": found.sum(-1), "feature": found.sum(-2), "global": found.sum((-1, -2))}[scope]
            assert (each == k).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_the_loop_sees_a_fault(scope: Any) -> None:
    scores = torch.randn(4, 4)
    wrong = {"token": "feature", "feature": "global", "global": "token"}[scope]
    assert not torch.equal(naive(scores, 2, wrong), winners(scores, 2, scope))


@pytest.mark.parametrize("scope", SCOPES)
def test_all_of_a_contest_may_win(scope: Any) -> None:
    size = {"token": 5, "feature": 4, "global": 20}[scope]
    assert winners(torch.randn(4, 5), size, scope).all()
    with pytest.raises(BudgetError, match=f"k={size + 1} cannot be met: a contest has {size}"):
        winners(torch.randn(4, 5), size + 1, scope)


def test_what_is_not_there_never_wins_and_what_must_stay_does() -> None:
    gone, sure = -torch.inf, torch.inf
    scores = torch.tensor([[gone, -5.0, gone], [1.0, 0.0, sure]])
    assert winners(scores, 1, "token").int().tolist() == [[0, 1, 0], [0, 0, 1]]
    assert winners(scores, 2, "global").int().tolist() == [[0, 0, 0], [1, 0, 1]]
    assert winners(scores, 4, "global").int().tolist() == [[0, 1, 0], [1, 1, 1]]
    with pytest.raises(BudgetError, match="a contest has 1 that may win; ask for 0 to 1"):
        winners(scores, 2, "token")
    with pytest.raises(BudgetError, match="a contest has 4"):
        winners(scores, 5, "global")


@pytest.mark.parametrize("scope", SCOPES)
def test_memory_in_another_order(scope: Any) -> None:
    scores = torch.randn(3, 5, 4).permute(2, 0, 1)
    assert torch.equal(winners(scores, 2, scope), winners(scores.contiguous(), 2, scope))


def test_bad_input() -> None:
    with pytest.raises(BudgetError, match="k=-1"):
        winners(torch.randn(2, 2), -1, "token")
    with pytest.raises(FewerError, match="nan"):
        winners(torch.tensor([[0.0, torch.nan]]), 1, "global")


def test_nothing_at_all() -> None:
    assert winners(torch.zeros(0, 3, 2), 1, "token").shape == (0, 3, 2)
    assert winners(torch.zeros(2, 0, 3), 0, "global").shape == (2, 0, 3)
