"""TopK: what the class token attends to stays."""

import math
from dataclasses import replace

import pytest
import torch

from fewer.methods.vit.topk import TopK
from fewer.signals.heads import Attended, Heads
from tests.methods.vit.build import DIM, HEADS, decide, groups, kept, place


def one_head(logits: list[list[float]]) -> dict[str, torch.Tensor]:
    """Queries and keys of one head whose product, before scaling, is these logits."""
    unit = torch.eye(len(logits))[None, None]
    return {"query": torch.tensor([[logits]]) * DIM**0.5, "key": unit, "value": unit}


def test_worked_example() -> None:
    """The class token's logits are ln 1, ln 2, ln 4, ln 3, so its attention is 0.1, 0.2, 0.4, 0.3: 2 and 3 stay."""
    heads = one_head([[math.log(x) for x in (1, 2, 4, 3)]] + [[0.0] * 4] * 3)
    tokens = place(4, rows=1, **heads, features=torch.tensor([[[7.0], [1], [2], [3]]]))
    torch.testing.assert_close(TopK().score(tokens), torch.tensor([[0.1, 0.2, 0.4, 0.3]]))
    plan = decide(TopK(), tokens, 2)
    assert groups(plan) == [[0], [2], [3]] and plan.apply(tokens.features).flatten().tolist() == [7, 2, 3]
    assert plan.mass is None, "what is dropped takes its mass with it"


def test_without_a_class_token_everyone_votes() -> None:
    """Token 0 attends to all alike, 1 and 2 give 0.8 to token 2 and 0.1 to either other: of three votes each, tokens 0
    and 1 get 1/3 + 0.1 + 0.1 and token 2 gets 1/3 + 0.8 + 0.8."""
    heads = one_head([[0.0, 0, 0], [0, 0, math.log(8)], [0, 0, math.log(8)]])
    tokens = place(3, rows=1, prefix=0, **heads)
    want = torch.tensor([[(1 / 3 + 0.2) / 3, (1 / 3 + 0.2) / 3, (1 / 3 + 1.6) / 3]])
    torch.testing.assert_close(TopK().score(tokens), want)
    assert kept(decide(TopK(), tokens, 1)) == [2]


def test_a_register_does_not_vote_for_all() -> None:
    """The same three tokens, of which the first is before the patches, but no class token."""
    heads = one_head([[0.0, 0, 0], [0, 0, math.log(8)], [0, 0, math.log(8)]])
    tokens, free = place(3, rows=1, prefix=1, **heads), place(3, rows=1, prefix=0, **heads)
    seen = replace(tokens.signal(Heads, Attended), classed=False)
    assert torch.equal(TopK().score(replace(tokens, signals={Heads: seen})), TopK().score(free))


@pytest.mark.parametrize("prefix", [0, 1])
def test_half_precision_ranks_as_single_precision_does(prefix: int) -> None:
    """Means over heads and queries are taken in float32: in bfloat16 most of them would be equal."""
    half = place(197, prefix=prefix, dtype=torch.bfloat16)
    seen = half.signal(Heads, Attended)
    whole = replace(seen, query=seen.query.float() / 4, key=seen.key.float())
    half = replace(half, signals={Heads: replace(seen, query=seen.query / 4)})
    got, want = TopK().score(half), TopK().score(replace(half, signals={Heads: whole}))
    assert got.dtype is torch.float32
    for row in range(2):
        assert len(set(got[row].topk(98).indices.tolist()) & set(want[row].topk(98).indices.tolist())) >= 97


def reference(tokens_row: Attended, row: int, i: int) -> list[float]:
    """What token i attends to, averaged over heads, with plain loops."""
    n = tokens_row.key.shape[2]
    mean = [0.0] * n
    for head in range(HEADS):
        query, keys = tokens_row.query[row, head, i].double(), tokens_row.key[row, head].double()
        logits = [math.exp(float(query @ keys[j]) / math.sqrt(DIM)) for j in range(n)]
        for j in range(n):
            mean[j] += logits[j] / sum(logits) / HEADS
    return mean


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("n", [6, 20, 41])
def test_agrees_with_the_reference(n: int, prefix: int) -> None:
    tokens = place(n, prefix=prefix, seed=n)
    attended, count = tokens.signal(Heads, Attended), (n - prefix) // 2
    plan = decide(TopK(), tokens, count)
    for row in range(2):
        rows = [reference(attended, row, i) for i in range(1 if prefix else n)]
        rated = [sum(one[j] for one in rows) / len(rows) for j in range(n)]
        torch.testing.assert_close(TopK().score(tokens)[row], torch.tensor(rated), atol=1e-5, rtol=1e-4)
        best = sorted(range(prefix, n), key=lambda j: -rated[j])[:count]
        assert kept(plan, row) == [*range(prefix), *sorted(best)]


def test_the_authors_keep_the_same() -> None:
    """Golden: Attention_TopK.forward of JoakimHaurum/TokenReduction models/topk.py (88fe07e), re-derived from reading,
    on place(14, rows=1, seed=7): the class token's attention to the patches, and the five that stay."""
    tokens = place(14, rows=1, seed=7)
    attention = [0.0352, 0.0353, 0.036, 0.0667, 0.0158, 0.1334, 0.1132, 0.0191, 0.2385, 0.1562, 0.0355, 0.0545, 0.0191]
    torch.testing.assert_close(TopK().score(tokens)[0, 1:], torch.tensor(attention), atol=1e-4, rtol=0)
    assert kept(decide(TopK(), tokens, 5)) == [0, 4, 6, 7, 9, 10]


def test_masses_change_what_is_attended_to() -> None:
    """Every logit is equal, and token 2 stands for four: it gets 4/7 of the attention and stays."""
    heads = one_head([[0.0] * 4] * 4)
    tokens = place(4, rows=1, **heads, mass=torch.tensor([[1.0, 1, 4, 1]]))
    torch.testing.assert_close(TopK().score(tokens), torch.tensor([[1 / 7, 1 / 7, 4 / 7, 1 / 7]]))
    assert kept(decide(TopK(), tokens, 1)) == [0, 2]


@pytest.mark.parametrize(("layers", "places"), [(12, [3, 6, 9]), (24, [6, 12, 18]), (4, [1, 2, 3]), (1, [0, 0, 0])])
def test_three_places(layers: int, places: list[int]) -> None:
    """The fourth, seventh and tenth of twelve blocks, counted from one, and the like."""
    assert TopK().places(layers) == places
