"""Turbo: what is redundant and says little is merged."""

import pytest
import torch
import torch.nn.functional as F

from fewer.errors import FewerError
from fewer.methods.vit.tome import ToMe
from fewer.methods.vit.turbo import Turbo
from fewer.signals.heads import Attended, Heads
from fewer.types import Tokens
from tests.methods.vit.build import DIM, decide, groups, place


def naive(tokens: Tokens, row: int, leave: int, alpha: float) -> list[list[int]]:
    """Slots of a row, with loops; token 0 is the class token."""
    attended = tokens.signal(Heads, Attended)
    n = tokens.features.shape[1]
    keys = attended.key[row].mean(0)
    semantic = [0.0] * n
    for query, key in zip(attended.query[row], attended.key[row], strict=True):
        logits = torch.stack([query[0] @ key[i] * DIM**-0.5 for i in range(n)])
        for i, weight in enumerate(logits.softmax(0).tolist()):
            semantic[i] += weight / len(attended.query[row])
    best = {}
    for i in range(2, n, 2):
        alike, j = max((float(F.cosine_similarity(keys[i], keys[j], dim=0)), j) for j in range(1, n, 2))
        best[i] = (alike - alpha * semantic[i], j)
    slots = {i: [i] for i in range(n)}
    for i in sorted(best, key=lambda i: -best[i][0])[:leave]:
        slots[best[i][1]] = sorted([*slots[best[i][1]], i])
        del slots[i]
    return [slots[i] for i in sorted(slots)]


def test_worked_example() -> None:
    """One head of two channels. Keys: class (0, 0), 1 at 0 degrees, 2 at 0, 3 at 90, 4 at 60. Tokens 2 and 4 may join
    1 and 3: cosines 1 and 0.87. The class token asks along (5, 0), so its logits are 0, 5, 5, 0, 2.5: it gives token 2
    0.48 of its attention and token 4 0.04. With alpha 1, E is 1 - 0.48 = 0.52 and 0.87 - 0.04 = 0.83: token 4 joins 3,
    though 2 and 1 are the same; with alpha 0 it is 2 that joins 1."""
    key = torch.tensor([[0.0, 0], [1, 0], [1, 0], [0, 1], [0.5, 0.866]]).view(1, 1, 5, 2)
    query = torch.zeros(1, 1, 5, 2)
    query[..., 0, 0] = 5 * DIM**0.5  # the scaling of these places takes it away again
    tokens = place(5, rows=1, query=query, key=key, value=key)
    worth = Turbo(alpha=1.0).score(tokens).value[0]
    assert worth.tolist() == pytest.approx([torch.inf, torch.inf, -0.5228, torch.inf, -0.8268], abs=1e-3)
    assert groups(decide(Turbo(alpha=1.0), tokens, 3)) == [[0], [1], [2], [3, 4]]
    assert groups(decide(Turbo(alpha=0.0), tokens, 3)) == [[0], [1, 2], [3], [4]]


@pytest.mark.parametrize("n", [5, 16, 33, 48])
@pytest.mark.parametrize("alpha", [10.0, 0.5])
def test_agrees_with_the_reference(n: int, alpha: float) -> None:
    tokens = place(n, seed=n)
    leave = (n - 1) // 4
    plan = decide(Turbo(alpha), tokens, n - 1 - leave)
    for row in range(2):
        assert groups(plan, row) == naive(tokens, row, leave, alpha)


def test_alpha_zero_is_tome() -> None:
    tokens = place(40, seed=2)
    turbo, tome = decide(Turbo(alpha=0.0), tokens, 0.6), decide(ToMe(), tokens, 0.6)
    assert torch.equal(turbo.assign, tome.assign)
    torch.testing.assert_close(turbo.apply(tokens.features), tome.apply(tokens.features), rtol=0, atol=0)


def test_a_large_alpha_leaves_what_the_class_token_attends_to() -> None:
    tokens = place(41, rows=1, seed=3)
    attended = tokens.signal(Heads, Attended)
    given = (attended.query[0, :, 0] * DIM**-0.5).unsqueeze(1) @ attended.key[0].transpose(-1, -2)
    semantic = given.softmax(-1).mean((0, 1))[2::2]
    slots = groups(decide(Turbo(alpha=1e6), tokens, 30))
    joined = {i for one in slots if len(one) > 1 for i in one}
    assert {2 * i + 2 for i in semantic.argsort()[:10].tolist()} == {i for i in joined if i % 2 == 0}


def test_without_a_class_token_all_vote() -> None:
    """Queries of zero attend alike to all, so nothing but the similarity is left."""
    tokens = place(24, prefix=0, query=torch.zeros(2, 2, 24, DIM))
    assert torch.equal(decide(Turbo(), tokens, 18).assign, decide(ToMe(), tokens, 18).assign)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_alpha_is_a_weight(alpha: float) -> None:
    with pytest.raises(FewerError, match=r"alpha=(-1.0|nan|inf): the weight of semantic value"):
        Turbo(alpha=alpha)
