"""Zero-TPrune: votes on the attention graph, tokens like others leave first, then the last in rank."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fewer.methods.vit.zero_tprune import ZeroTPrune
from fewer.signals.heads import Attended, Heads
from fewer.types import FewerError, Tokens, UnknownName
from tests.methods.vit.build import DIM, decide, kept, place


def graph(*attention: list[list[float]], likeness: Tensor | None = None) -> Tokens:
    """One row, whose heads have these attention matrices; `likeness` `(n, 3)` sets what keys are like one another in,
    which queries do not see."""
    n = len(attention[0])
    query = torch.cat([torch.tensor(attention).log(), torch.zeros(len(attention), n, 3)], -1) * DIM**0.5
    seen = torch.zeros(n, 3) if likeness is None else likeness
    key = torch.cat([torch.eye(n), seen], -1).expand(len(attention), -1, -1)
    value = torch.zeros(1, len(attention), n, 1)
    return place(n, features=torch.zeros(1, n, 1), query=query[None], key=key[None], value=value)


EVERYBODY = [[0.2, 0.35, 0.25, 0.15, 0.05]] * 5
"""All tokens vote alike, so one round settles the ranks."""


def test_worked_example() -> None:
    """Importance 0.35, 0.25, 0.15, 0.05 of four tokens. One must leave. By rank it is token 4; but token 3, of the less
    important half, says what token 1 says, so it goes first where all may leave for likeness."""
    likeness = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 0], [0, 0, 9]])
    tokens = graph(EVERYBODY, likeness=likeness)
    torch.testing.assert_close(ZeroTPrune().score(tokens)[0], torch.tensor(EVERYBODY[0]))
    assert kept(decide(ZeroTPrune(similar=0.0), tokens, 3)) == [0, 1, 2, 3]
    assert kept(decide(ZeroTPrune(similar=1.0), tokens, 3)) == [0, 1, 2, 4]
    assert kept(decide(ZeroTPrune(similar=0.5), tokens, 2)) == [0, 1, 2]  # 3 for likeness, then 4 by rank


def test_the_middle_token_is_of_the_better_half() -> None:
    """Five tokens in order of rank: only the last two may leave for likeness. Of them 4 is a little like 1; that 3 is
    very much like 1 costs it nothing."""
    likeness = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 0], [5, 0, 9], [0, 0, 0]])
    tokens = graph([[0.1, 0.3, 0.25, 0.2, 0.1, 0.05]] * 6, likeness=likeness)
    assert kept(decide(ZeroTPrune(similar=1.0), tokens, 4)) == [0, 1, 2, 3, 5]


def test_groups_may_alternate() -> None:
    """Ranks 1, 2, 3, 4 deal tokens 1 and 3 to one group, 2 and 4 to the other: 2, which is like 1, leaves."""
    likeness = torch.tensor([[0.0, 0, 0], [9, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    tokens = graph(EVERYBODY, likeness=likeness)
    assert kept(decide(ZeroTPrune(similar=1.0, groups="alternate"), tokens, 3)) == [0, 1, 3, 4]
    assert 2 in kept(decide(ZeroTPrune(similar=1.0), tokens, 3))


def test_the_class_token_has_more_say() -> None:
    """The class token gives all to token 1, the four others half to token 2 and a quarter each to tokens 3 and 4. It
    starts with sqrt(5) times their say, so token 1 gets sqrt(5) = 2.24, more than the 4 * 0.5 = 2 of token 2."""
    tiny = 1e-9
    rest = [tiny, tiny, 0.5, 0.25, 0.25]
    tokens = graph([[tiny, 1.0, tiny, tiny, tiny], rest, rest, rest, rest])
    total = 4 + 5**0.5
    expected = torch.tensor([0, 5**0.5, 2, 1, 1]) / total
    torch.testing.assert_close(ZeroTPrune().score(tokens)[0], expected, atol=1e-6, rtol=1e-5)


def test_a_register_has_no_more_say() -> None:
    """The same graph where the first token is no class token: token 1 gets 1, and 2 still 4 * 0.5."""
    tiny = 1e-9
    rest = [tiny, tiny, 0.5, 0.25, 0.25]
    tokens = graph([[tiny, 1.0, tiny, tiny, tiny], rest, rest, rest, rest])
    tokens = replace(tokens, signals={Heads: replace(tokens.signal(Heads, Attended), classed=False)})
    torch.testing.assert_close(ZeroTPrune().score(tokens)[0], torch.tensor([0, 1, 2, 1, 1]) / 5, atol=1e-6, rtol=1e-5)


def test_heads_that_say_nothing_are_left_out() -> None:
    """An even head varies by 0, below 0.01; where no head passes, all count."""
    even = [[0.2] * 5] * 5
    torch.testing.assert_close(ZeroTPrune().score(graph(EVERYBODY, even))[0], torch.tensor(EVERYBODY[0]))
    torch.testing.assert_close(ZeroTPrune().score(graph(even, even))[0], torch.tensor(even[0]))
    both = ((torch.tensor(EVERYBODY[0]) ** 2 + 0.2**2) / 2).sqrt()
    torch.testing.assert_close(ZeroTPrune(variance=(0.0, 9.0)).score(graph(EVERYBODY, even))[0], both)
    # 0.35, 0.25, 0.15, 0.05 are 1.75, 1.25, 0.75, 0.25 of their mean: a variance of 0.3125
    torch.testing.assert_close(ZeroTPrune(variance=(0.0, 0.3)).score(graph(EVERYBODY, even))[0], torch.tensor(even[0]))


def ranks(attended: Attended, row: int, there: list[int], prefix: int, rounds: int) -> dict[int, float]:
    """Importance of the tokens that are there, in plain loops."""
    heard, all_heads = [], []
    n = len(there)
    for h in range(attended.query.shape[1]):
        weights = []
        for i in there:
            logits = [float(attended.query[row, h, i] @ attended.key[row, h, j]) * attended.scaling for j in there]
            weights.append(torch.tensor(logits, dtype=torch.float64).softmax(0).tolist())
        s = [n**0.5 if prefix and i == 0 else 1.0 for i in there]
        s = [one / sum(s) for one in s]
        for _ in range(rounds):
            s = [sum(s[i] * weights[i][j] for i in range(n)) for j in range(n)]
        free = [one for one, j in zip(s, there, strict=True) if j >= prefix]
        mean = sum(free) / len(free)
        varied = sum((one / mean - 1) ** 2 for one in free) / len(free)
        all_heads.append(s)
        if 0.01 <= varied <= 0.7:
            heard.append(s)
    used = heard or all_heads
    return {j: (sum(s[at] ** 2 for s in used) / len(used)) ** 0.5 for at, j in enumerate(there)}


def naive(tokens: Tokens, row: int, count: int, prefix: int, rounds: int, similar: float) -> list[int]:
    attended = tokens.signal(Heads, Attended)
    n = attended.query.shape[2]
    free = list(range(prefix, n))
    first = ranks(attended, row, list(range(n)), prefix, 1)
    order = sorted(free, key=lambda j: -first[j])
    upper, lower = order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]
    keys = [attended.key[row, :, j].flatten() for j in range(n)]
    alike = {j: max(float(torch.cosine_similarity(keys[j], keys[i], dim=0)) for i in upper) for j in lower}
    leaving = min(int((len(free) - count) * similar), len(lower))
    gone = sorted(lower, key=lambda j: -alike[j])[:leaving]
    there = [j for j in range(n) if j not in gone]
    last = ranks(attended, row, there, prefix, rounds)
    best = sorted((j for j in there if j >= prefix), key=lambda j: -last[j])[:count]
    return sorted([*range(prefix), *best])


@pytest.mark.parametrize(("layer", "rounds"), [(0, 30), (1, 5), (3, 1)])
def test_agrees_with_the_reference(layer: int, rounds: int) -> None:
    for n, count, prefix, similar in (
        (6, 2, 1, 0.5),
        (13, 6, 1, 0.25),
        (20, 10, 0, 0.6),
        (20, 3, 2, 1.0),
        (20, 3, 1, 1.0),
    ):
        tokens = place(n, seed=n, prefix=prefix, layer=layer)
        plan = decide(ZeroTPrune(similar=similar), tokens, count)
        for row in range(2):
            assert kept(plan, row) == naive(tokens, row, count, prefix, rounds, similar)


def test_votes_depend_on_depth() -> None:
    made = ZeroTPrune(votes=(40, 7, 2))
    site = place(5).site
    got = [made._rounds(replace(site, layer=layer, layers=12)) for layer in range(12)]
    assert got == [40] * 3 + [7] * 6 + [2] * 3


def test_places_fit_any_depth() -> None:
    assert ZeroTPrune().places(12) == [1, 3, 6, 9, 11]
    for layers in (1, 2, 4, 24):
        assert all(0 <= at < layers for at in ZeroTPrune().places(layers))


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"similar": 1.5}, FewerError, r"similar=1\.5"),
        ({"votes": (30, 0, 1)}, FewerError, "from 1 on"),
        ({"variance": (0.7, 0.01)}, FewerError, "a least and a greatest"),
        ({"groups": "random"}, UnknownName, "sequential, alternate"),
    ],
)
def test_bad_arguments_are_refused(bad: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        ZeroTPrune(**bad)
