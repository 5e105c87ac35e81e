"""The helpers of these tests find the faults they are there to find."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.reduce.select import top_k
from fewer.signals import Received, Step
from fewer.types import Allocation, Budget, Plan, Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import (
    HalfRotary,
    agree,
    place,
    random_row,
    same_alone_and_padded,
    same_but_for_ties,
    same_in_chunks,
)


@dataclass(frozen=True)
class Careless:
    """Rates a key by its distance from the mean of all cells, padding too."""

    needs: frozenset[Any] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        return (tokens.features - tokens.features.mean(2, keepdim=True)).norm(dim=-1)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)


class LatestOnly:
    """Attention received in the last forward alone, though more of them came by."""

    key_bytes = 0

    def start(self) -> "LatestOnly":
        return LatestOnly()

    def observe(self, step: Step) -> None:
        self.inner = Received().start()
        self.inner.observe(step)

    def value(self) -> object:
        return self.inner.value()


@dataclass(frozen=True)
class Forgetful(Careless):
    """Rates keys by what a forgetful observer saw."""

    needs: frozenset[Any] = frozenset({LatestOnly()})

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.signal(LatestOnly, Tensor)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.01]),
        ([1.0, 2.0], [1.0, torch.inf]),
        ([1.0, -torch.inf], [1.0, torch.inf]),
        ([1.0, torch.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, 2.0, 3.0]),
    ],
)
def test_agree_sees_a_difference(ours: list[float], expected: list[float]) -> None:
    with pytest.raises(AssertionError):
        agree(torch.tensor(ours), torch.tensor(expected))


def test_agree_takes_what_is_equal() -> None:
    agree(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf], dtype=torch.float64))


def test_same_but_for_ties_sees_a_worse_choice() -> None:
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    same_but_for_ties(scores, [[0, 1]], [[0, 2]])
    for wrong in ([[0, 3]], [[0, 1, 2]]):
        with pytest.raises(AssertionError):
            same_but_for_ties(scores, [[0, 1]], wrong)


def test_same_alone_and_padded_sees_padding_that_counts() -> None:
    with pytest.raises(AssertionError):
        same_alone_and_padded(Careless(), 0.5)


def test_same_in_chunks_sees_a_forward_that_is_forgotten() -> None:
    same_in_chunks(Careless(), 0.5)
    with pytest.raises(AssertionError):
        same_in_chunks(Forgetful(), 0.5)


def test_place_shows_rows_as_a_host_does() -> None:
    """Padding is in front, holds numbers that are not zero, and real tokens count from 0."""
    tokens = place(Careless(), [random_row(2), random_row(5)], protect=[1])
    assert tokens.positions[0, 0].tolist() == [-1, -1, -1, 0, 1]
    assert tokens.positions[1, 1].tolist() == [0, 1, 2, 3, 4]
    assert tokens.padding[0, 0].tolist() == [True, True, True, False, False]
    assert tokens.protected[0, 0].tolist() == [False, False, False, False, True]
    assert tokens.seen.tolist() == [2, 5]
    assert bool((tokens.features[0, :, :3] == 50).all())


def test_the_rotary_helper_rotates() -> None:
    """Turning by 3 and back is nothing; 2 and then 5 is 7; the mean matrix turns like the mean of turned vectors."""
    rotary, x = HalfRotary(6), torch.randn(1, 2, 4, 6)
    at = torch.tensor([[3, 1, 4, 1]])
    torch.testing.assert_close(rotary.turn(rotary.turn(x, at), at, back=True), x)
    torch.testing.assert_close(rotary.turn(rotary.turn(x, at), 2 * at), rotary.turn(x, 3 * at))
    many = x[:, :, :1].expand(-1, -1, 5, -1)
    turned = rotary.turn(many, torch.arange(7, 12)[None]).mean(2)
    torch.testing.assert_close(x[:, :, 0] @ rotary.mean_matrix(torch.arange(7, 12)).T, turned)


def test_the_references_know_the_order_of_equals() -> None:
    assert naive.best([1.0, 3.0, 3.0, 0.0], 1) == [2]
    assert naive.best([1.0, 3.0, 3.0, 0.0], 2) == [1, 2]


def test_the_references_attend_causally() -> None:
    weights = naive.attention(torch.zeros(2, 3, 4), torch.randn(1, 3, 4))
    assert weights[1].tolist() == [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3]
