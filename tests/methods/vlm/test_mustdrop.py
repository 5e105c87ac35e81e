"""MustDrop: windows that are alike become one, and what neither words nor the tower need leaves."""

import math

import pytest
import torch
from torch import Tensor

from fewer.errors import FewerError
from fewer.methods.vlm.mustdrop import MustDrop
from fewer.types import Site
from tests.methods.vlm.build import lay, place, random, view
from tests.methods.vlm.look import asked, attention, look
from tests.methods.vlm.run import decide, kept, through

START, LATER = Site(-1, 32), Site(2, 32)


def test_a_window_becomes_one_token() -> None:
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [-1.0, 0.5]])
    features = torch.zeros(2, 4, 2)
    features[:, :2] = left  # the left window is all alike, the right one is not
    features[:, 2:] = right.view(2, 2, 2)
    tokens = place(8, grid=(2, 4), features=features, site=START)
    plan = decide(MustDrop(window=2), tokens, 5)
    assert plan.survivors.tolist() == [[2, 3, 5, 6, 7]]  # the left window stands where its last token stood
    assert plan.weight[0, [0, 1, 4, 5]].tolist() == [0.25] * 4
    assert torch.equal(plan.apply(tokens.features)[0, 2], left)
    partly = decide(MustDrop(window=2), tokens, 7)  # one leaves: the latest comes first where all are alike
    assert partly.counts.tolist() == [7] and partly.weight[0].max() == 1


def test_a_word_keeps_a_token() -> None:
    looked = asked([[0, 4, 0, 0, 0], [0, 0, 0, 3, 2]])
    tower = view(5, attention=torch.tensor([1.0, 0, 0, 0, 0]))
    tokens = place(5, looked=looked, tower=tower, site=LATER)
    assert kept(MustDrop(key=0.0), tokens, 2) == [1, 3]
    assert kept(MustDrop(key=0.2), tokens, 2) == [0, 1]  # the key token stays, whatever the words say


def test_windows_as_the_authors() -> None:
    """Numbers of their conditional_pooling and merge_wavg, run on these features with a threshold of 0.55; its places
    are those of the last token of each window."""
    noise = random(1, 9, 8, seed=9).reshape(1, 3, 1, 3, 1, 8).expand(1, 3, 3, 3, 3, 8).reshape(1, 81, 8)
    features = random(1, 81, 8) + 1.2 * noise
    stay = [20, 23, 26, 47, 50, *range(53, 60), *range(63, 69), *range(72, 78), 80]
    assert kept(MustDrop(), place(81, grid=(9, 9), features=features, site=START), 25) == stay


@pytest.mark.parametrize(
    ("seed", "stay"),
    [(0, [5, 7, 17, 22, 24, 25, 26, 27, 29, 32]), (1, [0, 4, 6, 8, 17, 20, 22, 25, 26, 30, 31, 39])],
)
def test_filter_as_the_authors(seed: int, stay: list[int]) -> None:
    """Numbers of a port of their dual_attention_filter (0.03 and 0.05) united with the key set of 4."""
    tokens = place(40, grid=(5, 8), looked=look(40, seed=seed), tower=view(40, seed=seed), site=LATER)
    assert kept(MustDrop(total=0.03, single=0.05), tokens, len(stay)) == stay


def windows(features: Tensor, grid: tuple[int, int], side: int, keep: int) -> list[list[int]]:
    """Which tokens become one, in plain Python."""
    n, w = len(features), grid[1]
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    groups: dict[tuple[int, int], list[int]] = {}
    for j in range(n):
        groups.setdefault((j // w // side, j % w // side), []).append(j)

    def like(group: list[int]) -> float:
        pairs = [float(unit[a] @ unit[b]) for a in group for b in group if a != b]
        return sum(pairs) / len(pairs) if pairs else -math.inf

    gone, out = n - keep, []
    for group in sorted(groups.values(), key=lambda group: -like(group)):
        take = min(gone, len(group) - 1)
        others = sorted(group[:-1], key=lambda j: -float(unit[j] @ unit[group[-1]]))
        out.append(sorted([*others[:take], group[-1]]))
        out += [[j] for j in others[take:]]
        gone -= take
    return sorted(out, key=max)


@pytest.mark.parametrize(("grid", "keep"), [((6, 6), 20), ((5, 7), 9), ((5, 7), 34), ((4, 4), 4)])
def test_windows_against_plain_python(grid: tuple[int, int], keep: int) -> None:
    n = grid[0] * grid[1]
    tokens = place(n, grid=grid, seed=n + keep, site=START)
    plan = decide(MustDrop(), tokens, keep)
    found = [sorted((plan.slot[0] == s).nonzero().flatten().tolist()) for s in range(keep)]
    expected = windows(tokens.features[0], grid, 3, keep)
    assert [set(one) for one in sorted(found, key=max)] == [set(one) for one in expected]


def test_filter_against_plain_python() -> None:
    looked, seen = look(20, seed=3), view(20, seed=3)
    maps = attention(looked)
    given = [[sum(head[i][3 + j] for head in maps) / 4 for j in range(20)] for i in range(3, 9)]
    total = sum(map(sum, given))
    both = [max(sum(row[j] for row in given) / total / 0.2, max(row[j] for row in given) / 0.1) for j in range(20)]
    key = sorted(range(20), key=lambda j: -float(seen.attention[:, j].mean()))[:2]
    rest = sorted(set(range(20)) - set(key), key=lambda j: -both[j])[:5]
    tokens = place(20, looked=looked, tower=seen, site=LATER)
    assert kept(MustDrop(total=0.2, single=0.1), tokens, 7) == sorted(key + rest)


def test_extremes() -> None:
    crops = place(27, layout=lay([(3, 3)] * 3), features=torch.ones(1, 27, 4), site=START)
    for keep in (1, 2, 3, 5, 26):  # fewer tokens than windows, or than crops: then windows grow
        plan = decide(MustDrop(), crops, keep)
        assert plan.counts.tolist() == [keep]
        torch.testing.assert_close(plan.apply(crops.features), torch.ones(1, keep, 4))
    tokens = place(20, looked=look(20), tower=True, site=LATER)
    for keep in (1, 19):
        assert len(kept(MustDrop(), tokens, keep)) == keep


def test_stages_follow_the_depth() -> None:
    assert MustDrop().after(32) == (-1, 2, 6, 10, 14)


@pytest.mark.parametrize("bad", [{"window": 1}, {"key": 1.5}, {"total": 0.0}, {"single": -1.0}, {"stages": (40,)}])
def test_bad_arguments(bad: dict[str, float]) -> None:
    with pytest.raises(FewerError, match=next(iter(bad))):
        MustDrop(**bad)  # type: ignore[arg-type]


def test_through_models() -> None:
    assert {after for after, _ in through("llava", "mustdrop")} == {-1, 0, 1, 2}
    assert {after for after, _ in through("qwen2_vl", MustDrop(by="received"))} == {-1, 0, 1, 2}
