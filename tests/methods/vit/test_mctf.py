"""MCTF: tokens that are alike, say little and are small are drawn together, two ways."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.compress import step
from fewer.methods.vit.mctf import MCTF
from fewer.score.heads import attention
from fewer.signals.heads import Attended, Heads
from fewer.types import Budget, BudgetError, Tokens
from tests.methods.vit.build import decide, groups, kept, place


def flat(angles: list[float]) -> Tensor:
    """Features of unit length at these angles, in degrees."""
    turned = torch.tensor(angles) * math.pi / 180
    return torch.stack([turned.cos(), turned.sin()], -1)[None]


def looked_at(logits: list[float]) -> dict[str, Tensor]:
    """Queries and keys that give every query the same attention, the softmax of these logits."""
    n = len(logits)
    query, key = torch.zeros(2, 1, 2, n, 8).unbind(0)
    query[..., 0], key[..., 0] = 8**0.5, torch.tensor(logits)
    return {"query": query, "key": key}


def test_worked_example() -> None:
    """Six patches, no class token, all received alike and of size one, so cosines alone draw.

    Angles: even tokens 0, 2, 4 at 0, 50, 170; odd tokens 1, 3, 5 at 10, 65, 100. Of the r = 3 that leave, one is even:
    token 0, ten degrees from 1 (2 is fifteen from 3, 4 is seventy from 5). Then two odd ones go to the even ones that
    are left, 2 and 4: 3 is fifteen from 2, and 1, with 0 in it, forty from 2, while 5 is fifty from 2.
    So 2 takes in 3, 1 and, through 1, 0.
    """
    tokens = place(6, rows=1, prefix=0, features=flat([0, 10, 50, 65, 170, 100]), **looked_at([0.0] * 6))
    plan = decide(MCTF(), tokens, 3)
    assert groups(plan) == [[0, 1, 2, 3], [4], [5]]
    assert kept(plan) == [2, 4, 5]
    assert plan.mass is not None and plan.mass.tolist() == [[4, 1, 1]]
    torch.testing.assert_close(plan.apply(tokens.features)[0, 0], tokens.features[0, :4].mean(0))


def test_a_merged_token_is_a_mean_by_attention_times_size() -> None:
    """Token 1 goes to token 0; they receive 3 and 1 parts of 5 of the attention, and count as 2 and 4: so 6 to 4."""
    heads = looked_at([math.log(3), 0.0, 0.0])
    mass = torch.tensor([[2.0, 4, 1]])
    bare = place(3, rows=1, prefix=0, features=flat([0, 10, 170]), **heads)
    tokens = place(3, rows=1, prefix=0, features=flat([0, 10, 170]), mass=mass, **heads)
    # attention counts masses by itself, which is taken off again here: received is 3 : 1 : 1
    seen = {Heads: bare.signals[Heads]}
    tokens = Tokens(**{**vars(tokens), "signals": seen})
    plan = decide(MCTF(), tokens, 2)
    assert groups(plan) == [[0, 1], [2]]
    torch.testing.assert_close(plan.weight, torch.tensor([[0.6, 0.4, 1]]))
    assert plan.mass is not None and plan.mass.tolist() == [[6, 1]]


@pytest.mark.parametrize(
    ("settings", "joined"), [({}, 2), ({"tau_info": 0.0}, 0), ({"tau_info": 0.1, "tau_sim": 0.0}, 2)]
)
def test_what_says_little_is_drawn_more(settings: dict[str, Any], joined: int) -> None:
    """Odd token 1 at 20 degrees is a little nearer to token 0, at 0, than to token 2, at 41; but all look at token 0.

    ((cos 20 + 1) / 2) / ((cos 21 + 1) / 2) = 1.003, against (received_0 / received_2)^(1/20) = e^(4/20) = 1.22.
    """
    tokens = place(3, rows=1, prefix=0, features=flat([0, 20, 41]), **looked_at([4.0, 0, 0]))
    assert groups(decide(MCTF(**settings), tokens, 2)) == ([[0, 1], [2]] if joined == 0 else [[0], [1, 2]])


def test_small_tokens_are_drawn_more() -> None:
    """The same angles: token 0 counts as 9, so that (9 / 1)^(1/40) = 1.056 makes token 2 the nearer one."""
    heads, mass = looked_at([0.0, 0, 0]), torch.tensor([[9.0, 1, 1]])
    tokens = place(3, rows=1, prefix=0, features=flat([0, 20, 41]), mass=mass, **heads)
    assert groups(decide(MCTF(tau_info=0.0), tokens, 2)) == [[0], [1, 2]]
    assert groups(decide(MCTF(tau_info=0.0, tau_size=0.0), tokens, 2)) == [[0, 1], [2]]


def naive(tokens: Tokens, row: int, leaving: int) -> tuple[list[list[int]], Tensor, list[float]]:
    """One row by plain loops: groups by their survivors' order, features, and sizes."""
    n = int((~tokens.padding[row]).sum())
    size = [1.0] * n if tokens.mass is None else tokens.mass[row].tolist()
    heads: Attended = tokens.signals[Heads]
    weights = attention(heads)[row]
    got = [
        float(sum(weights[h, q, k] for h in range(len(weights)) for q in range(n))) / len(weights) / n for k in range(n)
    ]
    x = tokens.features[row]

    def pull(a: int, b: int) -> float:
        cosine = float(x[a] @ x[b] / x[a].norm() / x[b].norm())
        return (cosine + 1) / 2 * (1 / got[a] / got[b]) ** (1 / 20) * (1 / size[a] / size[b]) ** (1 / 40)

    even = [i for i in range(0, n, 2) if not tokens.protected[row, i]]
    odd = [i for i in range(1, n, 2) if not tokens.protected[row, i]]
    into: dict[int, int] = {}
    for these, count in ((even, leaving // 2), (odd, leaving - leaving // 2)):
        those = [i for i in (odd if these is even else even) if i not in into]
        best = {i: max(those, key=lambda j, i=i: pull(i, j)) for i in these} if those else {}
        for i in sorted(best, key=lambda i: -pull(i, best[i]))[:count]:
            into[i] = best[i]
    homes = {i: into.get(into.get(i, i), into.get(i, i)) for i in range(n)}
    found = [[i for i in range(n) if homes[i] == k] for k in range(n) if k not in into]
    weight = [got[i] * size[i] for i in range(n)]
    mixed = [sum(weight[i] * x[i] for i in one) / sum(weight[i] for i in one) for one in found]
    return found, torch.stack(mixed), [sum(size[i] for i in one) for one in found]


@pytest.mark.parametrize(("n", "keep"), [(5, 3), (12, 7), (37, 20), (38, 30)])
def test_agrees_with_the_reference(n: int, keep: int) -> None:
    mass = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(n)).float()
    for tokens in (place(n, seed=n), place(n, seed=n, mass=mass, lengths=[n, n - 1], protect=[0, 3])):
        beside = int(tokens.protected[0].sum())
        plan = step(MCTF(), Budget(keep, tokens=keep - beside, beside=beside), tokens)
        for row in range(2):
            found, mixed, sizes = naive(tokens, row, int(tokens.available[row]) - keep)
            assert groups(plan, row) == found
            torch.testing.assert_close(plan.apply(tokens.features)[row], mixed, atol=1e-5, rtol=1e-5)
            assert plan.mass[row].tolist() == pytest.approx(sizes)


def test_the_authors_code_merges_the_same() -> None:
    """Golden: bipartite_soft_matching, both ways, and merge_wavg of mlvlab/MCTF utils/mctf.py (ef379fb), on place(17,
    mass=...) with r = 7 and taus 1, 20, 40; its groups in our order, and the sum of each merged token's features."""
    mass = torch.randint(1, 5, (2, 17), generator=torch.Generator().manual_seed(0)).float()
    tokens = place(17, mass=mass)
    plan = decide(MCTF(), tokens, 9)
    assert groups(plan) == [[0], [1], [3, 12, 14], [4, 11], [6], [7], [5, 8], [10], [13], [2, 9, 15, 16]]
    sums = [-8.0844, -5.9356, 0.2269, 0.3115, 2.2618, 2.3021, -0.6579, -1.4857, -0.1523, -3.3211]
    assert plan.apply(tokens.features)[0].sum(-1).tolist() == pytest.approx(sums, abs=2e-4)
    assert plan.mass is not None and plan.mass[0].tolist() == [1, 4, 5, 7, 4, 4, 6, 2, 4, 8]


def test_what_has_nobody_to_join_stays() -> None:
    """Of four patches beside a class token, at most three leave: the last even one takes all in. Of one patch, none."""
    assert decide(MCTF(), place(5, rows=1), 1).counts.tolist() == [2]
    assert decide(MCTF(), place(2, rows=1, prefix=0), 1).counts.tolist() == [1]
    assert decide(MCTF(), place(2, rows=1), 1).counts.tolist() == [2]
    assert decide(MCTF(), place(1, rows=1, prefix=0), 1).counts.tolist() == [1]
    assert decide(MCTF(), place(1, rows=1, prefix=1), 1).counts.tolist() == [1]


def test_tokens_that_get_no_attention_still_count_for_something() -> None:
    """All queries look at the class token, so far that in float32 the others get nothing at all."""
    tokens = place(9, rows=1, **looked_at([500.0] + [0.0] * 8))
    plan = decide(MCTF(), tokens, 4)
    assert bool(plan.apply(tokens.features).isfinite().all())
    torch.testing.assert_close(plan.apply(torch.ones(1, 9, 1)), torch.ones(1, 5, 1))


@pytest.mark.parametrize("name", ["tau_sim", "tau_info", "tau_size"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_bad_temperatures(name: str, value: float) -> None:
    with pytest.raises(BudgetError, match=rf"MCTF\({name}="):
        MCTF(**{name: value})


def test_it_acts_in_all_blocks_but_the_first() -> None:
    assert MCTF().places(12) == list(range(1, 12))
    assert MCTF().places(1) == [0]
