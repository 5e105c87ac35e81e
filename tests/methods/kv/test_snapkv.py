"""SnapKV: what the end of the prompt attends to, smoothed, and the end itself."""

import pytest
import torch
from torch import Tensor

from fewer.methods.kv.snapkv import SnapKV
from fewer.score import attention
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
    same_but_for_ties,
    same_in_chunks,
)

SMALL = SnapKV(window=8, kernel=5)


def test_worked_example() -> None:
    """One channel, a window of one query, 1, and keys ln 4, 1, 1, 1, 8, 1: weights 4, 1, 1, 1, 8, 1 sixteenths.

    Pooled by threes before the window, borders counting as zeros: (0+4+1)/3, (4+1+1)/3, (1+1+1)/3, (1+1+8)/3,
    (1+8+0)/3 = 5/3, 2, 1, 10/3, 3 sixteenths. Of three kept, one is the window's token 5; the best others are 3 and 4.
    Without pooling token 0 would have come before token 3.
    """
    keys = torch.tensor([[[4.0], [1], [1], [1], [8], [1]]]).log()
    row = Row(torch.ones(1, 6, 1), keys, keys)
    method = SnapKV(window=1, kernel=3)
    tokens = place(method, row)
    agree(method.score(tokens)[0, 0], torch.tensor([5 / 3, 2, 1, 10 / 3, 3, torch.inf]) / 16)
    assert kept(tokens, decide(method, 3, tokens)) == [[3, 4, 5]]
    assert kept(tokens, decide(SnapKV(window=1, kernel=1), 3, place(SnapKV(window=1, kernel=1), row))) == [[0, 4, 5]]


@pytest.mark.parametrize(
    ("window", "kernel", "pooling"), [(8, 5, "mean"), (8, 7, "max"), (1, 1, "mean"), (64, 3, "max")]
)
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int, window: int, kernel: int, pooling: str) -> None:
    method, row = SnapKV(window, kernel, pooling), random_row(n, heads=heads)
    tokens, expected = place(method, row), naive.snapkv(row.query, row.keys, window, kernel, pooling)
    agree(method.score(tokens)[0], expected)
    plan = decide(method, 0.6, tokens)
    count = n if n <= window else -(-n * 6 // 10)
    best = [naive.best(head, count) for head in expected]
    assert [len(head) for head in kept(tokens, plan)] == [count] * 2
    same_but_for_ties(expected, kept(tokens, plan), best)


def test_padding_counts_for_nothing() -> None:
    same_alone_and_padded(SMALL, 0.4)
    same_alone_and_padded(SnapKV(window=8, kernel=7, pooling="max"), 0.4)


def test_padding_may_be_no_number_at_all() -> None:
    same_alone_and_padded(SMALL, 0.4, lengths=(10, 20), filler=torch.nan)


def test_chunks_change_nothing() -> None:
    same_in_chunks(SMALL, 0.4)
    same_in_chunks(SMALL, 0.4, n=40, chunks=(37, 38))


@pytest.mark.parametrize("n", [1, 7, 8])
def test_a_prompt_within_the_window_is_kept_whole_and_said_so(n: int) -> None:
    tokens = place(SMALL, random_row(n))
    plan = decide(SMALL, 0.5, tokens)
    assert kept(tokens, plan) == [list(range(n))] * 2
    assert plan.note == (
        "" if n == 1 else f"rows of [{n}] tokens are no longer than the window of 8 and are kept whole"
    )


def test_a_prompt_one_longer_than_the_window_is_not() -> None:
    plan = decide(SMALL, 0.5, place(SMALL, random_row(9)))
    assert plan.counts.tolist() == [[5, 5]] and plan.note == ""


def test_a_budget_below_the_window_keeps_its_latest_tokens() -> None:
    tokens = place(SMALL, random_row(30))
    assert kept(tokens, decide(SMALL, 4, tokens)) == [[26, 27, 28, 29]] * 2


def test_the_window_is_rated_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads and 63 keys are 252 logits a query, so with room for 800 at once 3 of the 8 queries go together."""
    sizes, rows = [], attention.attention_rows

    def counted(query: Tensor, *rest: object) -> Tensor:
        sizes.append(query.shape[2])
        return rows(query, *rest)

    tokens = place(SMALL, random_row(63))
    expected = SMALL.score(tokens)
    monkeypatch.setattr(attention, "BLOCK_CELLS", 800)
    monkeypatch.setattr(attention, "attention_rows", counted)
    agree(SMALL.score(tokens), expected)
    assert sum(sizes) == 8 and max(sizes) <= 3


def test_protected_tokens_come_before_the_window() -> None:
    """Two protected tokens fit in a budget of four, so they stay, and the window's last two with them."""
    tokens = place(SMALL, random_row(30), protect=[0, 1])
    assert kept(tokens, decide(SMALL, 4, tokens)) == [[0, 1, 28, 29]] * 2


def test_the_authors_code_keeps_the_same() -> None:
    """Golden: SnapKVCluster(8, 20, 5, "avgpool").update_kv (FasterDecoding/SnapKV e216ddc), one query head a key head.

    On random_row(44, seed=0, heads=2): the indices its cache holds.
    """
    tokens = place(SMALL, random_row(44, seed=0, heads=2))
    assert kept(tokens, decide(SMALL, 20, tokens)) == [
        [2, 3, 4, 18, 19, 20, 21, 31, 32, 33, 34, 35, *range(36, 44)],
        [2, 17, 18, 19, 20, 23, 24, 25, 26, 27, 28, 29, *range(36, 44)],
    ]


def test_the_authors_code_keeps_the_same_scores_under_max_pooling() -> None:
    """Golden: SnapKVCluster(8, 20, 7, "maxpool") of the same commit on random_row(44, seed=1, heads=2).

    Max pooling gives runs of equal scores. Where the cut falls into a run the authors' topk takes any of them and we
    take the later ones, so only the scores are compared.
    """
    method = SnapKV(window=8, kernel=7, pooling="max")
    tokens = place(method, random_row(44, seed=1, heads=2))
    theirs = [
        [10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 27, 28, *range(36, 44)],
        [15, 16, 17, 18, 20, 24, 25, 26, 27, 28, 29, 30, *range(36, 44)],
    ]
    same_but_for_ties(method.score(tokens)[0], kept(tokens, decide(method, 20, tokens)), theirs)


@pytest.mark.parametrize("n", [19, 20])
def test_prompts_up_to_the_budget_stay_whole_as_in_the_authors_code(n: int) -> None:
    """Golden: with a capacity of 20 their cache holds all 19 of 19 and all 20 of 20."""
    tokens = place(SMALL, random_row(n, heads=2))
    assert kept(tokens, decide(SMALL, 20, tokens)) == [list(range(n))] * 2
