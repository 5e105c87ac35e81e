"""Token Transforming: every old token contributes to several new ones."""

import math

import pytest
import torch
import torch.nn.functional as F

from fewer.errors import BudgetError
from fewer.methods.vit.token_transforming import TokenTransforming
from fewer.reduce.fold import gather_in, masses
from fewer.signals.heads import Heads
from fewer.types import Plan, Tokens, Transform
from tests.methods.vit.build import decide, groups, kept, place


def test_worked_example() -> None:
    """Keys A = (1, 0), B = (0, 1) and C = (.1, .1); the class token's query (1, 1) finds 1, 1 and 0.2: A and B stay.

    Features are A = (1, 0), B = (0, 1) and C = (-1, -1), all shifted by (10, 20), their mean. Less it, A and B have the
    cosine 0, and C is as unlike both. The temperature is 1 / ln 3, so a cosine of 1 weighs 3 and one of 0 weighs 1. A
    gives itself 3/4 and B 1/4, B the reverse, C 1/2 each. Both new tokens have size 3/2 then, and A' is
    (3/4 A + 1/4 B + 1/2 C) / (3/2), which is (1/6, -1/6) from the mean; B' is (-1/6, 1/6).
    """
    key = torch.tensor([[-1.0, -1], [1, 0], [0, 1], [0.1, 0.1]]).view(1, 1, 4, 2)
    features = torch.tensor([[[77.0, 78], [11, 20], [10, 21], [9, 19]]])
    tokens = place(4, rows=1, query=torch.ones(1, 1, 4, 2), key=key, value=key, features=features)
    found = decide(TokenTransforming(temperature=1 / math.log(3)), tokens, 2)
    assert isinstance(found, Transform) and kept(found) == [0, 1, 2]
    torch.testing.assert_close(found.matrix[0, 1], torch.tensor([0, 1 / 2, 1 / 6, 1 / 3]))
    expected = torch.tensor([[77, 78], [10 + 1 / 6, 20 - 1 / 6], [10 - 1 / 6, 20 + 1 / 6]])
    torch.testing.assert_close(found.apply(features)[0], expected)
    assert found.mass is not None
    torch.testing.assert_close(found.mass, torch.tensor([[1, 1.5, 1.5]]))


def best_by_loops(tokens: Tokens, row: int, keep: int) -> list[int]:
    attended = tokens.signals[Heads]
    query, key = attended.query[row], attended.key[row]
    total = torch.zeros(key.shape[1])
    for head in range(len(query)):
        logits = torch.tensor([float(query[head, 0] @ key[head, j]) * attended.scaling for j in range(key.shape[1])])
        total += logits.softmax(0)
    return sorted(sorted(range(1, key.shape[1]), key=lambda j: -float(total[j]))[:keep])


@pytest.mark.parametrize(("n", "keep", "temperature"), [(8, 3, 0.05), (20, 9, 0.5), (33, 5, 0.1)])
def test_agrees_with_the_reference(n: int, keep: int, temperature: float) -> None:
    mass = torch.randint(1, 4, (2, n), generator=torch.Generator().manual_seed(1)).float()
    mass[:, 0] = 1
    tokens = place(n, seed=4, mass=mass)
    tokens.signals[Heads].bias.zero_()  # the reference below attends without sizes
    found = decide(TokenTransforming(temperature=temperature), tokens, keep)
    for row in range(2):
        chosen = best_by_loops(tokens, row, keep)
        assert kept(found, row) == [0, *chosen]
        x = tokens.features[row] - tokens.features[row, 1:].mean(0)
        new = [torch.zeros(tokens.features.shape[-1]) for _ in chosen]
        size = [0.0] * keep
        for j in range(1, n):
            like = [float(F.cosine_similarity(x[c], x[j], dim=0)) for c in chosen]
            weights = [math.exp(one / temperature) for one in like]
            for i in range(keep):
                part = weights[i] / sum(weights) * float(mass[row, j])
                new[i] = new[i] + part * tokens.features[row, j]
                size[i] += part
        expected = torch.stack([one / s for one, s in zip(new, size, strict=True)])
        torch.testing.assert_close(found.apply(tokens.features)[row, 1:], expected, atol=1e-5, rtol=1e-4)
        assert found.mass is not None
        torch.testing.assert_close(found.mass[row, 1:], torch.tensor(size))


def test_every_token_contributes_to_every_new_one() -> None:
    found = decide(TokenTransforming(temperature=0.5), place(20), 6)
    assert isinstance(found, Transform) and bool((found.matrix[:, 1:, 1:] > 0).all())
    assert bool((found.matrix[:, 1:, 0] == 0).all()) and bool((found.matrix[:, 0, 1:] == 0).all())
    torch.testing.assert_close(found.matrix.sum(-1), torch.ones(2, 7))


def hard(tokens: Tokens, keep: int) -> Plan:
    """The plan that sends every token to the informative one most like it, as a size-weighted mean."""
    x = tokens.features - tokens.features[:, 1:].mean(1, keepdim=True)
    partner = torch.zeros_like(tokens.positions)
    marked = torch.zeros_like(tokens.protected)
    for row in range(len(x)):
        chosen = best_by_loops(tokens, row, keep)
        marked[row, [0, *chosen]] = True
        for j in range(x.shape[1]):
            partner[row, j] = max(chosen, key=lambda c: float(F.cosine_similarity(x[row, c], x[row, j], dim=0)))
    return gather_in(tokens, Plan.keep(marked), partner, masses(tokens))


def test_merging_is_the_limit_of_a_low_temperature() -> None:
    tokens = place(24, seed=6)
    plan, soft = hard(tokens, 7), decide(TokenTransforming(temperature=1e-5), tokens, 7)
    assert isinstance(soft, Transform)
    torch.testing.assert_close(soft.matrix, Transform.of(plan).matrix)
    torch.testing.assert_close(soft.apply(tokens.features), plan.apply(tokens.features))
    assert soft.mass is not None and plan.mass is not None
    torch.testing.assert_close(soft.mass, plan.mass)
    assert [groups(soft, row) for row in range(2)] == [groups(plan, row) for row in range(2)]
    warm = decide(TokenTransforming(temperature=0.2), tokens, 7)
    assert not torch.allclose(warm.apply(tokens.features), plan.apply(tokens.features), atol=1e-2)


def test_pruning_has_rows_of_the_identity() -> None:
    """The same informative tokens, with the identity's rows in place of W, are Top-K's plan: they are only picked."""
    tokens = place(24, seed=6)
    soft = decide(TokenTransforming(), tokens, 7)
    assert isinstance(soft, Transform)
    picked = Transform(torch.eye(24)[soft.survivors], soft.survivors)
    marked = torch.zeros_like(tokens.protected).scatter(1, soft.survivors, True)
    plan = Plan.keep(marked)
    assert torch.equal(picked.matrix, Transform.of(plan).matrix)
    assert torch.equal(picked.apply(tokens.features), plan.apply(tokens.features))
    assert torch.equal(picked.apply(tokens.features), soft.pick(tokens.features))


def test_a_row_that_stays_whole_is_not_mixed() -> None:
    tokens = place(20, lengths=[20, 6])
    found = decide(TokenTransforming(), tokens, 8)
    out = found.apply(tokens.features)
    assert torch.equal(out[1, :6], tokens.features[1, :6])
    assert not torch.equal(out[0, :9], found.pick(tokens.features)[0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_bad_temperatures(temperature: float) -> None:
    with pytest.raises(BudgetError, match=rf"temperature={temperature}.*above 0"):
        TokenTransforming(temperature=temperature)
