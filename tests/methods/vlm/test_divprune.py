import pytest
import torch

from fewer.methods.vlm.divprune import DivPrune
from tests.methods.vlm.build import place
from tests.methods.vlm.waves import kept, through, waves


def naive(x: torch.Tensor, count: int) -> list[int]:
    unit = [(row / row.norm()).tolist() for row in x.double()]
    apart = [[1 - sum(a * b for a, b in zip(u, v, strict=True)) for v in unit] for u in unit]
    n = len(unit)
    chosen = [max(range(n), key=lambda i: min([apart[i][j] for j in range(n) if j != i]))]
    while len(chosen) < count:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(apart[i][j] for j in chosen)))
    return chosen


def test_directions() -> None:
    # north twice, north-east, and south: south has nobody near it, and then north is the farthest
    features = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 1.0], [0.0, -1.0]])
    assert kept(DivPrune(), place(4, features=features), 1) == [3]
    assert kept(DivPrune(), place(4, features=features), 2) == [0, 3]
    assert kept(DivPrune(), place(4, features=features), 3) == [0, 2, 3]


@pytest.mark.parametrize("count", [1, 5, 19])
def test_as_in_plain_python(count: int) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
    assert kept(DivPrune(), place(20, features=x), count) == sorted(naive(x, count))


def test_as_the_authors() -> None:
    # from DivPrune in LLaVA/llava/model/llava_arch.py of vbdi/divprune, on the same numbers
    order = [16, 3, 5, 21, 25, 20, 26, 17, 29, 22, 12, 13, 23, 4, 6, 9, 7, 28, 15, 10, 0, 11, 18, 27]
    tokens = place(30, features=waves(30, 8))
    for count in (3, 12, 24):
        assert kept(DivPrune(), tokens, count) == sorted(order[:count])


def test_copies_are_not_chosen_twice() -> None:
    assert kept(DivPrune(), place(6, features=torch.ones(6, 4)), 4) == [0, 1, 2, 3]
    assert len(kept(DivPrune(), place(6, features=torch.zeros(6, 4)), 5)) == 5


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_in_a_model(family: str) -> None:
    assert [after for after, *_ in through("divprune", family).plan] == [-1] * 3
