"""ZipVL: a layer's attention says how many tokens it needs."""

import pytest
import torch

from fewer.methods.kv.zipvl import ZipVL
from fewer.signals import ProbeQueries, Probes
from fewer.tiers import ChannelSeparable
from fewer.types import Budget
from tests.laws.battery import LAWS
from tests.methods.kv import naive
from tests.methods.kv.build import SIZES, Row, decide, kept, place, random_row, same_alone_and_padded
from tests.methods.kv.test_zipcache import important, naive_scores

DROP = ZipVL(variant="drop")


def example(method: ZipVL) -> Row:
    """One channel, the last query, 1, as the only probe, and keys ln 4, 1, 1, 2, 8: weights in sixteenths."""
    keys = torch.tensor([[[4.0], [1], [1], [2], [8]]]).log()
    return Row(torch.ones(1, 5, 1), keys, keys)


@pytest.mark.parametrize(("tau", "best"), [(0.5, [4]), (0.51, [3, 4]), (0.75, [3, 4]), (0.8, [0, 3, 4]), (1.0, None)])
def test_worked_example(tau: float, best: list[int] | None) -> None:
    """Sorted, the weights add up to 8, 12, 14, 15, 16 sixteenths: tau 1/2 takes one token, tau 3/4 two, 0.8 three.

    Who they are is decided by weight over how many queries see the token, 4/5, 1/4, 1/3, 2/2, 8/1: first 4, then 3,
    then 0. So the two that are needed for 3/4 are not the two that hold it, 4 and 0.
    """
    method = ZipVL(tau=tau, probes=0.1)
    tokens = place(method, example(method))
    plan = decide(method, 1.0, tokens)
    assert important(tokens, plan) == [best or list(range(5))] and kept(tokens, plan) == [list(range(5))]


@pytest.mark.parametrize(
    ("keep", "left"), [(0.99, [3, 4]), (0.6, [3, 4]), (2, [3, 4]), (0.2, [4]), (1.0, [0, 1, 2, 3, 4])]
)
def test_dropping_keep_is_a_ceiling(keep: float, left: list[int]) -> None:
    """Two tokens hold 3/4; where one is all that may stay, it is the better one. 1.0 keeps everything, as always."""
    method = ZipVL(tau=0.75, probes=0.1, variant="drop")
    tokens = place(method, example(method))
    plan = decide(method, keep, tokens)
    assert kept(tokens, plan) == [left] and plan.tier is None
    assert ("tau" in plan.note) == (keep in (0.99, 0.6))  # it keeps fewer than it was allowed


def test_the_last_token_attends_whatever_it_is_worth() -> None:
    """Keys ln 40, 1, 1, 2, 1: a half needs one token, and by worth, 40/5, 1/4, 1/3, 2/2, 1/1, it is the first."""
    keys = torch.tensor([[[40.0], [1], [1], [2], [1]]]).log()
    method = ZipVL(tau=0.5, probes=0.1)
    tokens = place(method, Row(torch.ones(1, 5, 1), keys, keys))
    assert important(tokens, decide(method, 1.0, tokens)) == [[0]]
    assert method.among is not None and kept(tokens, method.among(tokens, method.score(tokens))) == [[4]]
    assert ZipVL(dense=True).among is None


def needed(method: ZipVL, row: Row, probes: list[int]) -> int:
    """The least p for which the heads' p largest sums are tau of all."""
    h, n = row.keys.shape[:2]
    weights, groups = naive.attention(row.query, row.keys), row.query.shape[0] // h
    sums = [sum(weights[g * groups + i, probe] for i in range(groups) for probe in probes).tolist() for g in range(h)]  # type: ignore[union-attr]
    total = sum(sum(head) for head in sums)
    for p in range(1, n + 1):
        if sum(sum(sorted(head, reverse=True)[:p]) for head in sums) >= method.tau * total:
            return p
    return n


@pytest.mark.parametrize("tau", [0.3, 0.7, 0.975])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_agrees_with_the_reference(n: int, heads: int, tau: float) -> None:
    row = random_row(n, heads=heads)
    method = ZipVL(tau=tau)
    tokens = place(method, row)
    probes = tokens.signal(Probes, ProbeQueries).window.positions[0].tolist()
    p = needed(method, row, probes)
    expected = [naive.best(head, p) for head in naive_scores(row, probes)]
    assert important(tokens, decide(method, 1.0, tokens)) == expected
    drop = ZipVL(tau=tau, variant="drop")
    count = min(p, Budget.parse(0.8).count(n))
    assert kept(tokens, decide(drop, 0.8, tokens)) == [naive.best(head, count) for head in naive_scores(row, probes)]


def test_spread_attention_needs_more_tokens() -> None:
    row = random_row(64)
    counts = []
    for sharpness in (0.1, 1.0, 4.0):
        tokens = place(ZipVL(tau=0.9), Row(row.query * sharpness, row.keys, row.values))
        counts.append(len(important(tokens, decide(ZipVL(tau=0.9), 1.0, tokens))[0]))
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 3


def test_heads_that_hold_different_tokens_are_measured_each_by_itself() -> None:
    """After an earlier cut a column is not the same token at every head: shuffling a head's columns changes nothing."""
    tokens = place(DROP, random_row(40))
    scores = DROP.score(tokens)
    mixed = scores.clone()
    mixed[:, 1] = (scores[:, 1] * (40 - torch.arange(40))).flip(-1) / (40 - torch.arange(40))
    assert torch.equal(
        DROP.allocate(tokens, scores, Budget.parse(0.99)).counts,
        DROP.allocate(tokens, mixed, Budget.parse(0.99)).counts,
    )


@pytest.mark.parametrize("method", [ZipVL(), DROP], ids=["quantise", "drop"])
def test_padding_counts_for_nothing(method: ZipVL) -> None:
    same_alone_and_padded(method, 1.0 if method.whole else 0.5)
    same_alone_and_padded(method, 1.0 if method.whole else 0.5, lengths=(10, 20), filler=torch.nan)


@pytest.mark.parametrize("law", sorted(set(LAWS) - {"kept_count_is_exact"}))
def test_dropping_obeys_the_laws_too(law: str) -> None:
    """All but the one that the total is the budget, which here is a ceiling."""
    LAWS[law](DROP)


def test_protected_tokens_stay_beside_the_needed_ones() -> None:
    tokens = place(ZipVL(tau=0.5, variant="drop"), random_row(40), protect=(3, 4, 5))
    plan = decide(ZipVL(tau=0.5, variant="drop"), 0.99, tokens)
    assert all({3, 4, 5} <= set(head) for head in kept(tokens, plan))
    free = [len(head) - 3 for head in kept(tokens, plan)]
    assert free[0] == free[1] > 0


def test_the_stores_follow_the_variant() -> None:
    assert ZipVL().store == (ChannelSeparable(4), ChannelSeparable(2)) and ZipVL().whole
    assert DROP.store == (None,) and not DROP.whole
