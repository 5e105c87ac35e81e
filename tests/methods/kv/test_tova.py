"""TOVA: what the last token attends to stays, for all heads alike."""

import pytest
import torch

from fewer.methods.kv.tova import TOVA
from tests.methods.kv import naive
from tests.methods.kv.build import (
    SIZES,
    Cache,
    Row,
    agree,
    decide,
    kept,
    place,
    random_row,
    same_alone_and_padded,
    same_in_chunks,
)


def test_worked_example() -> None:
    """One channel, the last query is 1, so softmax weights are in proportion to e^key.

    Head 0's keys ln 1, 2, 5 give 1/8, 2/8, 5/8; head 1's keys ln 5, 2, 1 give 5/8, 2/8, 1/8; the mean is
    3/8, 2/8, 3/8. Tokens 0 and 2 stay at both heads, though each head alone would have kept token 1.
    Queries before the last one do not count.
    """
    query = torch.tensor([[[9.0], [-9], [1]]] * 2)
    keys = torch.tensor([[[1.0], [2], [5]], [[5], [2], [1]]]).log()
    tokens = place(TOVA(), Row(query, keys, keys))
    torch.testing.assert_close(TOVA().score(tokens), torch.tensor([[[3 / 8, 2 / 8, 3 / 8]] * 2]))
    assert kept(tokens, decide(TOVA(), 2, tokens)) == [[0, 2], [0, 2]]


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int) -> None:
    row = random_row(n, heads=heads)
    tokens, expected = place(TOVA(), row), naive.tova(row.query, row.keys)
    agree(TOVA().score(tokens)[0], expected)
    assert kept(tokens, decide(TOVA(), 0.5, tokens)) == [naive.best(expected[0], -(-n // 2))] * 2


def test_padding_counts_for_nothing() -> None:
    same_alone_and_padded(TOVA(), 0.3)


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(TOVA(), 0.3, lengths=(10, 20), filler=torch.nan)


def test_chunks_change_nothing() -> None:
    same_in_chunks(TOVA(), 0.3)
    same_in_chunks(TOVA(), 0.3, n=8, chunks=(7,))


def test_the_models_softcap_and_scale_count() -> None:
    """Logits 4 and 0, capped at 2: 2 tanh 2 = 1.928, so the first token gets 1 / (1 + e^-1.928) = 0.873."""
    row = Row(torch.ones(1, 2, 1), torch.tensor([[[8.0], [0]]]), torch.ones(1, 2, 1))
    tokens = place(TOVA(), row, scaling=0.5, softcap=2.0)
    torch.testing.assert_close(TOVA().score(tokens)[0, 0, 0], torch.tensor(0.8730), atol=1e-4, rtol=0)


def test_large_half_precision_queries_do_not_overflow() -> None:
    """100 * 100 * 8 = 80,000 is above float16's 65,504, the scaled logit of 28,284 is not; all keys are equal."""
    flat = torch.full((2, 3, 8), 100.0).half()
    tokens = place(TOVA(), Row(flat, flat, flat))
    torch.testing.assert_close(TOVA().score(tokens), torch.full((1, 2, 3), 1 / 3))


def test_the_authors_code_keeps_the_same_token_after_token() -> None:
    """Golden: TOVACache.reduce (schwartz-lab-NLP/TOVA 9c7d09b) on random_row(30, seed=3), cache_size 6.

    Ten tokens at once, then one by one, each time with the softmax of the queries over what was held; kept indices
    after the first, the sixth and the last call.
    """
    row, cache, seen = random_row(30, seed=3), Cache(TOVA(), 6), []
    for start, end in [(0, 10), *((i, i + 1) for i in range(10, 30))]:
        cache.forward(row.part(start, end))
        seen.append(cache.positions.tolist())
    assert seen[0] == [[1, 2, 4, 6, 7, 9]] * 2
    assert seen[5] == [[1, 4, 7, 12, 13, 14]] * 2
    assert seen[-1] == [[21, 22, 26, 27, 28, 29]] * 2
