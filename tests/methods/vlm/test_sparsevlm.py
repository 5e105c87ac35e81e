"""SparseVLM: raters among the words, and recycling inside the budget."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fewer.errors import FewerError
from fewer.methods.vlm.sparsevlm import SparseVLM
from fewer.signals.visual import Looked, TextAttention
from fewer.types import Allocation, Budget, Plan, Tokens
from tests.methods.vlm.build import place, random
from tests.methods.vlm.look import asked, attention, look, turned
from tests.methods.vlm.run import decide, kept, through


def test_worked_example() -> None:
    """The second word is like the picture's tokens and alone rates them."""
    looked = asked([[9, 0, 0, 0], [0, 3, 1, 2]], states=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tokens = place(4, features=torch.tensor([[2.0, 0.0], [2.0, 0.1], [2.0, 0.2], [2.0, 0.3]]), looked=looked)
    assert kept(SparseVLM(version=2), tokens, 2) == [1, 3]
    plan = decide(SparseVLM(), tokens, 2)  # token 1, and the better of what it leaves: token 3, alone in its cluster
    assert plan.survivors.tolist() == [[1, 3]] and plan.slot.tolist() == [[-1, 0, -1, 1]]
    assert plan.weight.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("version", [1, 2])
def test_scores_against_plain_python(version: int) -> None:
    looked, features = look(12, seed=5, heads=4), random(1, 12, 8, seed=6)
    states = looked.states[3:]
    worth = (features[0] @ states.T).softmax(-1).mean(0).tolist()
    raters = [i for i, one in enumerate(worth) if one > sum(worth) / 6]
    assert 0 < len(raters) < 6
    maps = attention(looked)
    ones = turned(torch.ones(21, 8), *looked.turns) if looked.turns is not None else torch.ones(0)
    level = (ones @ ones.T * looked.scaling).tolist()
    rated = [
        [[maps[h][3 + i][3 + j] / (level[15 + i][3 + j] if version == 2 else 1) for j in range(12)] for i in raters]
        for h in range(4)
    ]
    rated = sorted(rated, key=lambda head: -sum(map(sum, head)))[: 2 if version == 2 else 4]
    mean = [sum(row[j] for head in rated for row in head) / len(rated) / len(raters) for j in range(12)]
    found = SparseVLM(version=version, heads=2).score(place(12, features=features, looked=looked))
    torch.testing.assert_close(found[0], torch.tensor(mean), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_words_before_a_picture_do_not_rate_it(version: int) -> None:
    """Three words stand between a first picture and this one, and are what its tokens are like."""
    features = random(1, 12, 8, seed=6) + 4 * torch.eye(8)[0]
    looked = look(12, seed=5)
    looked = replace(looked, after=torch.ones(9, dtype=torch.bool))
    between = looked.states.clone()
    between[:3] = 4 * torch.eye(8)[0]
    method = SparseVLM(version=version, heads=2)
    found, alone = (
        method.score(place(12, features=features, looked=one))
        for one in (replace(looked, states=between), replace(looked, after=looked.text > 3))
    )
    assert bool(alone.any())
    assert torch.equal(found, alone)


FIRST = [
    (0, [0, 1, 5, 11, 14, 15, 16, 22, 23, 24, 26, 27, 28, 34, 36, 41, 44, 45, 48, 52, 55, 57], [1.7673, 2.0281]),
    (1, [5, 6, 7, 10, 13, 20, 22, 24, 29, 30, 33, 36, 39, 41, 43, 45, 46, 47, 48, 54, 55, 57], [-3.4062, -0.4502]),
]


@pytest.mark.parametrize(("seed", "stay", "sums"), FIRST)
def test_first_version_as_the_authors(seed: int, stay: list[int], sums: list[float]) -> None:
    """Numbers of a port of their attn_postprocess_topk (20 tokens) and cluster_and_merge (13 of the other 40 in two
    clusters), the noise on densities replaced by the order of the tokens: sums of the two merged tokens' features."""
    features = random(1, 60, 8, seed=seed + 70)
    tokens = place(60, features=features, looked=look(60, words=7, heads=20, kv_heads=4, seed=seed))
    plan = decide(SparseVLM(), tokens, 22)
    assert plan.survivors[0].tolist() == stay
    made = (plan.slot[0].clamp(min=0).bincount(minlength=22) - (plan.slot[0] < 0).sum() * (torch.arange(22) == 0)) > 1
    assert plan.weight[0][plan.slot[0] >= 0].sum().item() == pytest.approx(22)
    found = plan.apply(features)[0][made].sum(-1).sort().values
    torch.testing.assert_close(found, torch.tensor(sums), atol=1e-3, rtol=1e-3)


SECOND = [
    (0, [1, 6, 8, 9, 10, 11, 14, 15, 16, 17, 19, 20, 22, 23, 24, 27, 38, 56, 58, 59]),
    (1, [0, 5, 7, 8, 9, 10, 13, 14, 15, 16, 17, 19, 21, 23, 25, 35, 55, 57, 58, 59]),
]


@pytest.mark.parametrize(("seed", "stay"), SECOND)
def test_second_version_as_the_authors(seed: int, stay: list[int]) -> None:
    """Numbers of a port of their version 2 (attention over the rotary product, 14 of 20 heads, 20 tokens)."""
    tokens = place(
        60, features=random(1, 60, 8, seed=seed + 70), looked=look(60, words=7, heads=20, kv_heads=4, seed=seed)
    )
    assert kept(SparseVLM(version=2), tokens, 20) == stay


@pytest.mark.parametrize("keep", [1, 2, 3, 10, 59])
def test_counts_duplicates_and_extremes(keep: int) -> None:
    same = place(60, features=torch.ones(1, 60, 8), looked=look(60))
    for version in (1, 2):
        plan = decide(SparseVLM(version=version), same, keep)
        assert plan.counts.tolist() == [keep]
        torch.testing.assert_close(plan.apply(same.features), torch.ones(1, keep, 8))


def test_stages_follow_the_depth() -> None:
    assert SparseVLM().after(32) == (2, 6, 15)
    assert SparseVLM().after(28) == (1, 5, 13)
    assert SparseVLM(stages=(30,)).after(5) == (3,)


def test_bad_arguments() -> None:
    for bad in ({"version": 3}, {"stages": ()}, {"stages": (31,)}, {"heads": 0}):
        with pytest.raises(FewerError, match=next(iter(bad))):
            SparseVLM(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_through_a_model(family: str, version: int) -> None:
    assert {after for after, _ in through(family, SparseVLM(version=version))} == {0, 2}


@dataclass(frozen=True)
class Watching:
    """SparseVLM that shows what it was given."""

    seen: list[Looked]
    inner: SparseVLM = field(default_factory=lambda: SparseVLM(version=2))
    needs: ClassVar[frozenset[object]] = SparseVLM.needs

    def after(self, layers: int) -> tuple[int, ...]:
        return self.inner.after(layers)

    def score(self, tokens: Tokens) -> Tensor:
        self.seen.append(tokens.signal(TextAttention, Looked))
        return self.inner.score(tokens)

    def allocate(self, tokens: Tokens, scores: Tensor, budget: Budget) -> Allocation:
        return self.inner.allocate(tokens, scores, budget)

    def reduce(self, tokens: Tokens, scores: Tensor, allocation: Allocation) -> Plan:
        return self.inner.reduce(tokens, scores, allocation)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_turns_are_those_of_the_model(family: str) -> None:
    """Plain keys, turned by hand, are the keys: at both cuts, also of the row that is padded."""
    method = Watching([])
    through(family, method)
    assert len(method.seen) >= 4
    for looked in method.seen:
        assert looked.turns is not None
        torch.testing.assert_close(turned(looked.plain_key, *looked.turns), looked.key, atol=1e-5, rtol=1e-5)
        words = looked.turns[:, looked.text]
        torch.testing.assert_close(turned(looked.plain_query, *words), looked.query, atol=1e-5, rtol=1e-5)
