"""top_k keeps the best of each leading index, in order, and the later of equals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.reduce.select import top_k
from fewer.types import Allocation


def chosen(scores: list[float], count: int) -> list[int]:
    plan = top_k(torch.tensor([scores]), Allocation(torch.tensor([count])))
    plan.check()
    return plan.survivors[0].tolist()


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ([1.0, 5, 3, 4], 2, [1, 3]),
        ([2.0, 2, 2, 2], 2, [2, 3]),  # of equals the later ones
        ([3.0, 1, 1, 0], 2, [0, 2]),
        ([torch.inf, 1, torch.inf, torch.inf], 2, [2, 3]),
        ([-torch.inf, -9.0, -torch.inf, -8.0], 2, [1, 3]),  # padding last
        ([0.0, -0.0, 1.0, 2.0], 0, []),
        ([0.0, -1.0, 1.0, 2.0], 4, [0, 1, 2, 3]),
    ],
)
def test_worked_examples(scores: list[float], count: int, kept: list[int]) -> None:
    assert chosen(scores, count) == kept


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_it_is_a_sort_by_score_and_then_by_place(data: st.DataObject) -> None:
    scores = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20))
    count = data.draw(st.integers(0, len(scores)))
    ranked = sorted(range(len(scores)), key=lambda j: (scores[j], j), reverse=True)
    assert chosen(scores, count) == sorted(ranked[:count])


def test_every_leading_index_has_its_own_count() -> None:
    scores = torch.arange(24.0).view(2, 3, 4)
    counts = torch.tensor([[0, 1, 2], [3, 4, 1]])
    plan = top_k(scores, Allocation(counts))
    plan.check()
    assert torch.equal(plan.counts, counts)
    assert plan.survivors[1].tolist() == [[1, 2, 3, -1], [0, 1, 2, 3], [3, -1, -1, -1]]
    assert torch.equal(plan.weight, (plan.slot >= 0).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_precision_will_do(dtype: torch.dtype) -> None:
    plan = top_k(torch.tensor([[1.0, 3.0, 2.0]], dtype=dtype), Allocation(torch.tensor([2])))
    assert plan.survivors.tolist() == [[1, 2]]
