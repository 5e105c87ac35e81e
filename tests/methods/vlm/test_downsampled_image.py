"""A smaller picture: as large as the budget pays for, each of its cells standing in the middle of the old ones."""

import pytest
import torch

import fewer
from fewer.allocate.lattice import Lattice
from fewer.methods.vlm.downsampled_image import DownsampledImage
from fewer.types import Budget, Site, Tokens, UnsupportedModel
from tests import vlms


def place(rows: int, columns: int) -> Tokens:
    n = rows * columns
    none = torch.zeros(1, n, dtype=torch.bool)
    site = Site(-2, grid=(rows, columns))
    return Tokens(torch.zeros(1, n, 1), torch.arange(n).unsqueeze(0), none, none, torch.tensor([n]), site=site)


def decide(rows: int, columns: int, count: int) -> tuple[list[int], list[int]]:
    method, tokens = DownsampledImage(), place(rows, columns)
    allocation = method.allocate(tokens, method.score(tokens), Budget(count, tokens=count))
    assert isinstance(allocation, Lattice)
    return allocation.shape[0].tolist(), method.reduce(tokens, method.score(tokens), allocation).survivors[0].tolist()


def test_by_hand() -> None:
    """6 x 6 patches as 2 x 2: cells of 3 x 3, whose middles are in rows and columns 1 and 4."""
    assert decide(6, 6, 4) == ([2, 2], [7, 10, 25, 28])


@pytest.mark.parametrize(("count", "shape"), [(36, [6, 6]), (35, [5, 6]), (9, [3, 3]), (5, [2, 2]), (1, [1, 1])])
def test_never_more_than_asked(count: int, shape: list[int]) -> None:
    found, survivors = decide(6, 6, count)
    assert found[0] * found[1] == len(survivors) <= count and sorted(found) == sorted(shape)


def test_of_a_wide_picture() -> None:
    found, survivors = decide(4, 8, 8)
    assert found == [2, 4] and len(survivors) == 8


def test_other_families_are_refused() -> None:
    refused = pytest.raises(UnsupportedModel, match="serves models of the llava family")
    with refused, fewer.compress(vlms.qwen2_vl().model, "downsampled-image", keep=4):
        pass
