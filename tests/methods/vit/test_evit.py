"""EViT: the attentive tokens stay, the others are fused into one."""

import torch
from torch import Tensor

from fewer.methods.vit.evit import EViT
from fewer.signals.heads import Attended, Heads
from fewer.types import Plan, Tokens
from tests.methods.vit.build import DIM, decide, groups, kept, place


def paying(*attention: float, features: list[float]) -> Tokens:
    """One row, one head, whose class token pays these shares of its attention."""
    n = len(attention)
    query, key = torch.zeros(1, 1, n, DIM), torch.zeros(1, 1, n, DIM)
    query[..., 0] = DIM**0.5
    key[0, 0, :, 0] = torch.tensor(attention).log()
    return place(n, features=torch.tensor(features).view(1, n, 1), query=query, key=key, value=torch.ones(1, 1, n, 1))


def test_worked_example() -> None:
    """The class token pays 0.4, 0.05, 0.3, 0.15 to four tokens. Of three, two are kept, 1 and 3; 2 and 4, worth 10 and
    20, become 0.05 * 10 + 0.15 * 20 = 3.5 in the place of 4, the better of them; as a mean, 3.5 / 0.2 = 17.5."""
    tokens = paying(0.1, 0.4, 0.05, 0.3, 0.15, features=[1, 2, 10, 3, 20])
    plan = decide(EViT(), tokens, 3)
    assert kept(plan) == [0, 1, 3, 4]
    assert groups(plan) == [[0], [1], [3], [2, 4]]
    torch.testing.assert_close(plan.apply(tokens.features).flatten(), torch.tensor([1, 2, 3, 3.5]))
    mean = decide(EViT(normalised=True), tokens, 3).apply(tokens.features)
    torch.testing.assert_close(mean.flatten(), torch.tensor([1, 2, 3, 17.5]))


def test_the_fused_token_counts_as_all_of_them() -> None:
    plan = decide(EViT(), paying(0.1, 0.4, 0.05, 0.3, 0.15, features=[1, 2, 10, 3, 20]), 3)
    assert isinstance(plan, Plan) and plan.mass is not None
    assert plan.mass.tolist() == [[1, 1, 1, 2]]


def test_one_token_may_be_all_that_is_left() -> None:
    plan = decide(EViT(), paying(0.1, 0.4, 0.05, 0.3, 0.15, features=[1, 2, 10, 3, 20]), 1)
    assert groups(plan) == [[0], [1, 2, 3, 4]]


def naive(attended: Attended, x: Tensor, row: int, count: int) -> dict[int, list[float]]:
    """The tokens that are left, by the place that each has, protected one first; everything in plain loops."""
    heads, n, _ = attended.query.shape[1:]
    paid = [0.0] * n
    for h in range(heads):
        logits = [float(attended.query[row, h, 0] @ attended.key[row, h, j]) * attended.scaling for j in range(n)]
        total = sum(torch.tensor(logits).exp().tolist())
        for j in range(n):
            paid[j] += float(torch.tensor(logits[j]).exp()) / total / heads
    order = sorted(range(1, n), key=lambda j: -paid[j])
    left = {j: x[row, j].tolist() for j in [0, *order[: count - 1]]}
    rest = order[count - 1 :]
    if len(rest) > 1:
        left[rest[0]] = [sum(paid[j] * float(x[row, j, c]) for j in rest) for c in range(x.shape[-1])]
    else:
        left |= {j: x[row, j].tolist() for j in rest}
    return left


def test_agrees_with_the_reference() -> None:
    for n, count in ((5, 2), (12, 6), (37, 18), (37, 36)):
        tokens = place(n, seed=n)
        plan = decide(EViT(), tokens, count)
        got = plan.apply(tokens.features)
        for row in range(2):
            expected = naive(tokens.signal(Heads, Attended), tokens.features, row, count)
            assert kept(plan, row) == sorted(expected)
            torch.testing.assert_close(got[row], torch.tensor([expected[j] for j in sorted(expected)]))


def test_a_row_that_may_keep_everything_fuses_nothing() -> None:
    tokens = place(37, lengths=[37, 9])
    plan = decide(EViT(), tokens, 10)
    assert groups(plan, 1) == [[j] for j in range(9)]
    assert torch.equal(plan.apply(tokens.features)[1, :9], tokens.features[1, :9])


def test_without_a_class_token_attention_from_all_rates() -> None:
    tokens = place(12, prefix=0)
    attended = tokens.signal(Heads, Attended)
    logits = attended.query @ attended.key.transpose(-1, -2) * attended.scaling
    got = logits.softmax(-1).mean((1, 2))
    plan = decide(EViT(), tokens, 5)
    for row in range(2):
        assert kept(plan, row) == sorted(got[row].topk(5).indices.tolist())


def test_the_authors_code_leaves_the_same() -> None:
    """Golden: Block of youweiliang/evit (evit.py, cc1993d), keep_rate 0.5 and fuse_token, on place(37, rows=1, seed=4);
    the outputs of attention and MLP set to zero. 18 of 36 tokens and the extra one, of which six channels."""
    tokens = place(37, rows=1, seed=4)
    plan = decide(EViT(), tokens, 19)
    alone = [group[0] for group in groups(plan) if len(group) == 1]
    assert alone == [0, 3, 4, 5, 6, 7, 8, 11, 15, 17, 18, 23, 25, 26, 28, 32, 33, 34, 35]
    fused = plan.apply(tokens.features)[0, kept(plan).index(1), :6]
    extra = torch.tensor([-0.010498, -0.077838, 0.034878, 0.056423, -0.045176, 0.005026])
    torch.testing.assert_close(fused, extra, atol=1e-6, rtol=0)
