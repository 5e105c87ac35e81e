"""ATS: even samples of cumulative significance; how many tokens stay is an outcome."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewer.methods.vit.ats import ATS
from fewer.signals.heads import Attended, Heads
from fewer.types import Tokens
from tests.methods.vit.build import DIM, decide, kept, place


def paying(attention: list[float], norms: list[float]) -> Tokens:
    """One row, one head, whose class token pays these shares of its attention to values of these norms."""
    n = len(attention)
    query, key = torch.zeros(1, 1, n, DIM), torch.zeros(1, 1, n, DIM)
    query[..., 0] = DIM**0.5
    key[0, 0, :, 0] = torch.tensor(attention).log()
    value = torch.tensor(norms).view(1, 1, n, 1)
    return place(n, features=torch.zeros(1, n, 1), query=query, key=key, value=value)


def test_worked_example() -> None:
    """Attention 0.05, 0.05, 0.3, 0.05, 0.05 to values of norm 1, 1, 2, 1, 1: significances of 1, 1, 12, 1, 1 in 16,
    so the cumulative ones are 0.0625, 0.125, 0.875, 0.9375, 1. Of four samples, 0.125 and 0.375 are nearest to token 2,
    0.625 and 0.875 to token 3: two tokens stay, where four might have."""
    tokens = paying([0.5, 0.05, 0.05, 0.3, 0.05, 0.05], [9, 1, 1, -2, 1, 1])
    torch.testing.assert_close(ATS().score(tokens)[0, 1:], torch.tensor([0.05, 0.05, 0.6, 0.05, 0.05]))
    assert kept(decide(ATS(), tokens, 4)) == [0, 2, 3]


def test_even_attention_keeps_as_many_as_are_sampled() -> None:
    """Eight tokens alike, three samples at 1/6, 1/2, 5/6: the nearest eighths are the first, fourth and seventh."""
    assert kept(decide(ATS(), paying([0.1] * 9, [1.0] * 9), 3)) == [0, 1, 4, 7]


def naive(attended: Attended, row: int, samples: int, prefix: int) -> list[int]:
    """Everything in plain loops; all tokens from `prefix` on are rated."""
    _, heads, n, _ = attended.query.shape
    rated = [0.0] * n
    for h in range(heads):
        for i in range(1 if prefix else n):
            logits = [float(attended.query[row, h, i] @ attended.key[row, h, j]) * attended.scaling for j in range(n)]
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
            for j in range(n):
                rated[j] += weights[j] * float(attended.value[row, h, j].norm())
    total, sums, running = sum(rated[prefix:]), [], 0.0
    for j in range(prefix, n):
        running += rated[j] / total
        sums.append(running)
    taken = set(range(prefix))
    for k in range(samples):
        apart = [abs((2 * k + 1) / (2 * samples) - one) for one in sums]
        taken.add(prefix + apart.index(min(apart)))
    return sorted(taken)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_agrees_with_the_reference(prefix: int) -> None:
    for n, count in ((6, 2), (12, 6), (37, 18), (37, 33)):
        tokens = place(n, seed=n, prefix=prefix)
        plan = decide(ATS(), tokens, count)
        for row in range(2):
            assert kept(plan, row) == naive(tokens.signal(Heads, Attended), row, count, prefix)


def test_without_a_class_token_a_register_is_not_asked() -> None:
    tokens = place(37, seed=1, prefix=1)
    seen = tokens.signal(Heads, Attended)
    free = ATS().score(place(37, seed=1, prefix=0))
    assert torch.equal(ATS().score(replace(tokens, signals={Heads: replace(seen, classed=False)})), free)
    assert not torch.allclose(ATS().score(tokens), free)


def test_rows_may_keep_different_numbers() -> None:
    plan = decide(ATS(), place(37, rows=8), 18)
    counts = plan.counts.tolist()
    assert len(set(counts)) > 1 and max(counts) <= 19
    assert (plan.survivors < 0).sum(-1).tolist() == [max(counts) - one for one in counts]


def test_protected_tokens_take_no_sample() -> None:
    tokens = place(37, protect=(7, 20))
    rated = ATS().score(tokens)[0].tolist()
    open_ = [j for j in range(37) if j not in (0, 7, 20)]
    total, running, sums = sum(rated[j] for j in open_), 0.0, []
    for j in open_:
        running += rated[j] / total
        sums.append(running)
    drawn = set()
    for k in range(9):
        apart = [abs((2 * k + 1) / 18 - one) for one in sums]
        drawn.add(open_[apart.index(min(apart))])
    assert kept(decide(ATS(), tokens, 9)) == sorted({0, 7, 20} | drawn)


def test_there_may_be_more_samples_than_tokens() -> None:
    """Where many have left before, the samples still are as many as the budget says, of the tokens once there."""
    tokens: Tokens = replace(place(9, rows=1, seed=2), seen=torch.tensor([101]))
    assert kept(decide(ATS(), tokens, 0.2)) == naive(tokens.signal(Heads, Attended), 0, 20, 1)


def test_an_existing_port_keeps_the_same() -> None:
    """Golden: AdaptiveTokenSampling(12) of JoakimHaurum/TokenReduction (models/ats.py, dc1c773) on place(37, rows=1,
    seed=4). With other counts its steps may leave out the last sample, for rounding."""
    plan = decide(ATS(), place(37, rows=1, seed=4), 12)
    assert kept(plan) == [0, 2, 5, 8, 11, 16, 20, 24, 28, 32, 33, 34, 35]


def significance(attended: Attended) -> Tensor:
    logits = attended.query @ attended.key.transpose(-1, -2) * attended.scaling
    return (logits.softmax(-1)[:, :, 0] * attended.value.norm(dim=-1)).sum(1)


def test_significance_is_rated_in_full_precision() -> None:
    half = place(37, dtype=torch.bfloat16)
    got = ATS().score(half)
    assert got.dtype is torch.float32
    whole = half.signal(Heads, Attended)
    whole = replace(whole, query=whole.query.float(), key=whole.key.float(), value=whole.value.float())
    torch.testing.assert_close(got, significance(whole), atol=0.02, rtol=0.05)
