"""KNorm: keys of small norm stay."""

import pytest
import torch

from fewer.methods.kv.knorm import KNorm
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
    """Keys (3, 4), (1, 0), (0, 2) have norms 5, 1, 2; of three, the two smallest stay: tokens 1 and 2."""
    row = Row(torch.zeros(1, 3, 2), torch.tensor([[[3.0, 4], [1, 0], [0, 2]]]), torch.zeros(1, 3, 2))
    tokens = place(KNorm(), row)
    assert KNorm().score(tokens).tolist() == [[[-5, -1, -2]]]
    assert kept(tokens, decide(KNorm(), 2, tokens)) == [[1, 2]]


@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int) -> None:
    row = random_row(n)
    tokens, expected = place(KNorm(), row), naive.knorm(row.keys)
    agree(KNorm().score(tokens)[0], expected)
    assert kept(tokens, decide(KNorm(), 0.5, tokens)) == [naive.best(head, -(-n // 2)) for head in expected]


def test_padding_counts_for_nothing() -> None:
    same_alone_and_padded(KNorm(), 0.3)


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(KNorm(), 0.3, lengths=(10, 20), filler=torch.nan)


def test_norms_are_not_rounded_to_half_precision() -> None:
    """64 channels of 60 have the norm 480; with one of them 59 it is 479.876, which bfloat16 would round to 480."""
    keys = torch.full((1, 2, 64), 60.0, dtype=torch.bfloat16)
    keys[0, 0, 0] = 59
    tokens = place(KNorm(), Row(keys, keys, keys))
    agree(KNorm().score(tokens)[0, 0], -torch.tensor([(480**2 - 119) ** 0.5, 480.0]))
    assert KNorm().score(tokens)[0, 0, 0] > KNorm().score(tokens)[0, 0, 1]


def test_kvpress_keeps_the_same() -> None:
    """Golden: KnormPress.score of kvpress 0.5.5 (8bb29b9) on random_row(40, seed=0), its top 10 a head."""
    tokens = place(KNorm(), random_row(40, seed=0))
    assert kept(tokens, decide(KNorm(), 10, tokens)) == [
        [5, 6, 18, 20, 21, 22, 23, 29, 31, 37],
        [1, 6, 10, 18, 29, 30, 34, 35, 36, 38],
    ]
