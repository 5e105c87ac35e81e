"""CriticalKV: half by the scores, half by what dropping a value does to the output."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.allocate.uniform import uniform
from fewer.methods.kv import criticalkv
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.criticalkv import CriticalKV, projected_norms
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.snapkv import SnapKV
from fewer.reduce.select import top_k
from fewer.signals import Projection
from fewer.types import Allocation, Budget, FewerError, MissingSignal, Plan, Tokens
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Row,
    decide,
    kept,
    place,
    projection,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)


@dataclass(frozen=True)
class Norms:
    """The longest keys."""

    needs: frozenset[Any] = frozenset()

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return uniform(tokens, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return top_k(scores, allocation)


def test_worked_example() -> None:
    """Scores 5, 4, 3, 2, 1; values 1, 1, 1, 2, 9 and a projection (1, -2), so the norms are 3, 3, 3, 6, 27.

    Two are kept. The first half, one, goes by score: token 0. Of the others the products are 12, 9, 12 and 27: token 4.
    By scores alone it would be 0 and 1; with three, one goes first and of 12, 9, 12 the later, 3, is the second.
    """
    keys = torch.tensor([[[5.0], [4], [3], [2], [1]]])
    values = torch.tensor([[[1.0], [1], [1], [2], [9]]])
    method = CriticalKV(Norms(), eps=0.0)
    tokens = place(method, Row(torch.ones(1, 5, 1), keys, values), output=torch.tensor([[[1.0, -2.0]]]))
    assert projected_norms(tokens).tolist() == [[[3, 3, 3, 6, 27]]]
    assert kept(tokens, decide(method, 2, tokens)) == [[0, 4]]
    assert kept(tokens, decide(method, 3, tokens)) == [[0, 3, 4]]
    assert kept(tokens, decide(CriticalKV(Norms(), first=1.0), 2, tokens)) == [[0, 1]]


def test_eps_lets_great_values_in_that_nobody_looked_at() -> None:
    """Scores 2, 1 and 0, norms 1, 1 and 30,000: raised by 1e-4 the last is worth 3, the second 1."""
    keys, values = torch.tensor([[[2.0], [1], [0]]]), torch.tensor([[[1.0], [1], [30000]]])
    for eps, expected in ((1e-4, [0, 2]), (0.0, [0, 1])):
        method = CriticalKV(Norms(), eps=eps)
        tokens = place(method, Row(torch.ones(1, 3, 1), keys, values), output=torch.ones(1, 1, 1))
        assert kept(tokens, decide(method, 2, tokens)) == [expected]


def reference(scores: Tensor, row: Row, counts: list[int], method: CriticalKV, floors: list[int]) -> list[list[int]]:
    """Each head by itself: the first stage, then products with norms worked out value by value."""
    h, n, _ = row.keys.shape
    groups, weight, out = row.query.shape[0] // h, projection(row.query.shape[0], row.values.shape[-1]), []
    for g in range(h):
        sure = naive.best(scores[g], max(int(counts[g] * method.first + 1e-6), floors[g]))
        worth = []
        for j in range(n):
            norm = 0.0
            for head in range(g * groups, (g + 1) * groups):
                norm += float((row.values[g, j].double() @ weight[head].double()).abs().sum()) / groups
            worth.append((float(scores[g, j]) + method.eps) * norm)
        rest = sorted((j for j in range(n) if j not in sure), key=lambda j: (worth[j], j), reverse=True)
        out.append(sorted([*sure, *rest[: counts[g] - len(sure)]]))
    return out


@pytest.mark.parametrize("first", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, first: float) -> None:
    row, method = random_row(n), CriticalKV(H2O(recent=0.0), first)
    tokens = place(method, row)
    counts = [-(-n * 4 // 10)] * 2
    expected = reference(naive.h2o(row.query, row.keys), row, counts, method, [0, 0])
    assert kept(tokens, decide(method, 0.4, tokens)) == expected


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
def test_with_everything_in_the_first_stage_it_is_its_scorer(keep: float) -> None:
    for scorer in (SnapKV(window=8), Norms(), AdaKV(SnapKV(window=8))):
        method, row = CriticalKV(scorer, first=1.0), random_row(63)
        one, other = place(method, row), place(scorer, row)
        assert kept(one, decide(method, keep, one)) == kept(other, decide(scorer, keep, other))


def test_around_adakv_the_floor_goes_by_the_scores() -> None:
    """Uneven heads, each with its floor first, even where that is more than half; without the floor it would differ."""
    found = {}
    for floor in (0.9, 0.0):
        method, row = CriticalKV(AdaKV(Norms(), floor=floor)), random_row(63, heads=8, kv_heads=4)
        row = Row(row.query, row.keys * torch.linspace(0.5, 1.5, 4).view(4, 1, 1), row.values)
        tokens = place(method, row)
        scores = method.score(tokens)
        allocation = method.allocate(tokens, scores, Budget.parse(0.3))
        assert allocation.floor is not None and len({int(c) for c in allocation.counts[0]}) > 1
        counts, floors = allocation.counts[0].tolist(), allocation.floor[0].tolist()
        found[floor] = kept(tokens, decide(method, 0.3, tokens))
        assert found[floor] == reference(scores[0], row, counts, method, floors)
        plain = kept(tokens, method.reduce(tokens, scores, replace(allocation, floor=None)))
        assert (plain != found[floor]) == (floor > 0.5)


def test_forced_and_protected_tokens_stay_however_small_their_values_are() -> None:
    """The window's values, and a protected one, are nothing at all; enormous ones elsewhere do not push them out."""
    method, row = CriticalKV(SnapKV(window=8)), random_row(63)
    values = row.values * 1e30
    values[:, 55:] = values[:, 5] = 0
    tokens = place(method, Row(row.query, row.keys, values), protect=[5])
    for head in kept(tokens, decide(method, 12, tokens)):
        assert {5, *range(55, 63)} <= set(head) and len(head) == 12
    few = place(method, Row(row.query, row.keys, values), protect=[5])
    assert all(5 in head for head in kept(few, decide(method, 3, few)))


def test_padding_and_chunks_change_nothing() -> None:
    for method in (CriticalKV(SnapKV(window=4)), CriticalKV(AdaKV(H2O(recent=0.0)))):
        same_alone_and_padded(method, 0.5)
        same_alone_and_padded(method, 0.5, lengths=(10, 20), filler=torch.nan)
        same_in_chunks(method, 0.4)


@pytest.mark.parametrize("cells", [1, 50])
def test_blocks_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = place(CriticalKV(), random_row(23))
    whole = projected_norms(tokens)
    monkeypatch.setattr(criticalkv, "BLOCK_CELLS", cells)
    torch.testing.assert_close(projected_norms(tokens), whole)


def test_what_it_cannot_work_with_is_named() -> None:
    assert CriticalKV(KNorm()).needs == {Projection()} and CriticalKV().needs == SnapKV().needs | {Projection()}
    tokens = place(CriticalKV(KNorm()), random_row(9))
    with pytest.raises(FewerError, match="needs them to be at least 0; KNorm gives negative ones"):
        decide(CriticalKV(KNorm()), 3, tokens)
    bare = replace(place(CriticalKV(Norms()), random_row(9)), values=None)
    with pytest.raises(MissingSignal, match="no values here"):
        decide(CriticalKV(Norms()), 3, bare)
    hidden = replace(place(CriticalKV(Norms()), random_row(9)), signals={Projection: None})
    with pytest.raises(MissingSignal, match="Projection"):
        decide(CriticalKV(Norms()), 3, hidden)


def grown() -> Row:
    """Values that grow along the row, so that the second stage has something to say."""
    row = random_row(40, seed=3)
    return Row(row.query, row.keys, row.values * torch.linspace(0.1, 3, 40)[None, :, None])


def test_the_authors_code_keeps_the_same() -> None:
    """Golden: CriticalKVPress (kvpress 0.5.5, by the paper's first author) around a press that scores by key norms.

    compression_ratio 0.7, epsilon 1e-4, first_stage_ratio 0.5, on random_row(40, seed=3) with grown values and the
    projection of build.py; the 12 best of its scores.
    """
    tokens = place(CriticalKV(Norms()), grown())
    assert kept(tokens, decide(CriticalKV(Norms()), 12, tokens)) == [
        [8, 10, 19, 21, 22, 26, 29, 32, 35, 36, 37, 39],
        [0, 3, 7, 16, 22, 26, 28, 29, 31, 33, 36, 39],
    ]


def test_the_authors_code_keeps_the_same_over_uneven_heads() -> None:
    """Golden: CriticalAdaKVPress(alpha_safeguard=0.6) likewise, with the keys of head 1 longer by a quarter.

    Its heads get 7 and 17 of 24, by a rule of its own; 7 are guaranteed, which is more than half of 7.
    """
    row = grown()
    row = Row(row.query, row.keys * torch.tensor([1.0, 1.25]).view(2, 1, 1), row.values)
    method = CriticalKV(Norms())
    tokens = place(method, row)
    allocation = Allocation(torch.tensor([[7, 17]]), floor=torch.tensor([[7, 7]]))
    assert kept(tokens, method.reduce(tokens, method.score(tokens), allocation)) == [
        [8, 10, 19, 22, 26, 32, 35],
        [0, 3, 5, 6, 7, 14, 16, 20, 22, 23, 26, 28, 29, 31, 33, 36, 39],
    ]
