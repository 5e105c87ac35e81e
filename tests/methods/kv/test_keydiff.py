"""KeyDiff: keys unlike the average key stay."""

import pytest
import torch

from fewer.methods.kv.keydiff import KeyDiff
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
)


def test_worked_example() -> None:
    """Keys (2, 0), (1, 0), (0, 3) point along x, x and y; their mean direction is (2, 1) / 3.

    The cosines to it are 2 / sqrt 5 = 0.894, the same, and 1 / sqrt 5 = 0.447. Token 2 differs most; the other two are
    equal, and the later one, token 1, stays with it.
    """
    row = Row(torch.zeros(1, 3, 2), torch.tensor([[[2.0, 0], [1, 0], [0, 3]]]), torch.zeros(1, 3, 2))
    tokens = place(KeyDiff(), row)
    torch.testing.assert_close(KeyDiff().score(tokens), torch.tensor([[[-2 / 5**0.5, -2 / 5**0.5, -1 / 5**0.5]]]))
    assert kept(tokens, decide(KeyDiff(), 2, tokens)) == [[1, 2]]


@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int) -> None:
    row = random_row(n)
    tokens, expected = place(KeyDiff(), row), naive.keydiff(row.keys)
    agree(KeyDiff().score(tokens)[0], expected)
    assert kept(tokens, decide(KeyDiff(), 0.5, tokens)) == [naive.best(head, -(-n // 2)) for head in expected]


def test_padding_is_no_part_of_the_average() -> None:
    same_alone_and_padded(KeyDiff(), 0.3)


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(KeyDiff(), 0.3, lengths=(10, 20), filler=torch.nan)


def test_kvpress_keeps_the_same() -> None:
    """Golden: KeyDiffPress.score of kvpress 0.5.5 (8bb29b9) on random_row(40, seed=0), its top 10 a head."""
    tokens = place(KeyDiff(), random_row(40, seed=0))
    assert kept(tokens, decide(KeyDiff(), 10, tokens)) == [
        [2, 8, 9, 11, 16, 18, 21, 23, 33, 36],
        [6, 9, 10, 11, 16, 20, 24, 28, 34, 35],
    ]
