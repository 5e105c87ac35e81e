"""Random: an even draw that padding, batches and layers do not disturb."""

import pytest
import torch

from fewer.methods.any.random import Random
from fewer.types import Site
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Row,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
)


def test_worked_example() -> None:
    """Layer 0, seed 0, one head: the scores are the first numbers of the generator seeded with 0.

    They are 0.4963, 0.7682, 0.0885, 0.1320 (torch's well-known first draws), so tokens 0 and 1 stay.
    """
    tokens = place(Random(seed=0), Row(*(torch.zeros(1, 4, 2) for _ in range(3))))
    scores = Random(seed=0).score(tokens)[0, 0]
    torch.testing.assert_close(scores, torch.tensor([0.4963, 0.7682, 0.0885, 0.1320]), atol=1e-4, rtol=0)
    assert kept(tokens, decide(Random(seed=0), 2, tokens)) == [[0, 1]]


@pytest.mark.parametrize("n", SIZES)
def test_keeps_the_highest_draws(n: int) -> None:
    tokens = place(Random(seed=3), random_row(n))
    scores = Random(seed=3).score(tokens)[0]
    expected = [naive.best(head, -(-n // 2)) for head in scores]
    assert kept(tokens, decide(Random(seed=3), 0.5, tokens)) == expected


def test_padding_does_not_disturb_the_draw() -> None:
    same_alone_and_padded(Random(seed=5), 0.5)


def test_heads_layers_and_seeds_draw_differently() -> None:
    drawn = set()
    for seed in (0, 1):
        for layer in (0, 1):
            tokens = place(Random(seed), random_row(63), site=Site(layer, 2))
            drawn |= {tuple(head) for head in kept(tokens, decide(Random(seed), 0.5, tokens))}
    assert len(drawn) == 2 * 2 * 2


def test_every_token_is_kept_equally_often() -> None:
    """400 seeds, 20 tokens, half kept: each is kept 200 times on average, with a standard deviation of 10."""
    tokens = place(Random(), Row(*(torch.zeros(1, 20, 2) for _ in range(3))))
    times = sum((decide(Random(seed), 0.5, tokens).slot[0, 0] >= 0).long() for seed in range(400))
    assert int(times.sum()) == 400 * 10
    assert int((times - 200).abs().max()) < 45
