"""ToFu: look-alikes are dropped early, and merged late into means as long as their longest member."""

import math
from functools import partial

import pytest
import torch

from fewer.methods.vit.tofu import ToFu
from fewer.types import FewerError, Plan
from tests.laws import encoder_battery
from tests.methods.vit import naive_pairs as naive
from tests.methods.vit.build import decide, groups, kept, place

KEYS = torch.tensor([[[[1.0, 0], [1, 0], [0.6, 0.8], [0, 1], [0, 2]]]])
FEATURES = torch.tensor([[[9.0, 9], [1, 1], [2, 0], [0, 3], [4, 0]]])
HEADS = {"query": KEYS, "key": KEYS, "value": KEYS}


def test_worked_example() -> None:
    """Token 4's key is most like token 3's. Early it is dropped, and token 3 stays as it is.

    Late they merge: the mean of (0, 3) and (4, 0) is (2, 1.5), 2.5 long; the longest member, (4, 0), is 4 long; so the
    slot is 1.6 times the mean, (3.2, 2.4), and either member weighs 0.8.
    """
    early = place(5, rows=1, features=FEATURES, at=0, places=2, **HEADS)
    plan = decide(ToFu(), early, 3)
    assert groups(plan) == [[0], [1], [2], [3]] and plan.mass is None
    assert plan.apply(FEATURES).tolist() == [[[9, 9], [1, 1], [2, 0], [0, 3]]]
    plan = decide(ToFu(), place(5, rows=1, features=FEATURES, at=1, places=2, **HEADS), 3)
    assert groups(plan) == [[0], [1], [2], [3, 4]] and plan.mass.tolist() == [[1, 1, 1, 2]]
    torch.testing.assert_close(plan.weight, torch.tensor([[1, 1, 1, 0.8, 0.8]]))
    torch.testing.assert_close(plan.apply(FEATURES), torch.tensor([[[9, 9], [1, 1], [2, 0], [3.2, 2.4]]]))


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("n", [8, 19, 64])
def test_agrees_with_the_reference(n: int, prefix: int) -> None:
    """Means are over members alike, whatever they stand for."""
    mass = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(n)).float()
    early, late = (place(n, prefix=prefix, seed=n, mass=mass, at=at, places=8) for at in (3, 4))
    leaving = (n - prefix) // 3
    drops, folds = (decide(ToFu(), tokens, n - prefix - leaving) for tokens in (early, late))
    for row in range(2):
        keys, x = naive.mean_keys(late, row), late.features[row]
        joins = naive.halves(n, lambda i, j: naive.cosine(keys[i], keys[j]), set(range(prefix)), leaving)  # noqa: B023
        assert kept(drops, row) == [i for i in range(n) if i not in joins]
        assert torch.equal(drops.apply(early.features)[row], x[kept(drops, row)])
        expected = naive.grouped(n, joins)
        assert groups(folds, row) == expected
        slots = []
        for members in expected:
            mean = naive.mean(x, members, [1.0] * n)
            longest = max(math.hypot(*x[i].tolist()) for i in members)
            slots.append([c / math.hypot(*mean) * longest for c in mean])
        torch.testing.assert_close(folds.apply(late.features)[row], torch.tensor(slots))
        assert folds.mass[row].tolist() == [sum(mass[row, i] for i in members) for members in expected]


def test_the_reimplementations_match_the_same() -> None:
    """Golden: bipartite_soft_matching of hchautran/PiToMe algo/tofu/merge.py (550b5de), re-derived from reading, on the
    head-mean keys of place(14, rows=1, seed=7) with r=5: who is left by mode "prune"; the groups of mode "tofu", and
    the first three channels of each, at unit length, for its length is another (see the method's file)."""
    plan = decide(ToFu(), place(14, rows=1, seed=7, at=0, places=2), 8)
    assert kept(plan) == [0, 1, 3, 5, 7, 9, 11, 12, 13]
    tokens = place(14, rows=1, seed=7, at=1, places=2)
    plan = decide(ToFu(), tokens, 8)
    together = [[1, 8], [2, 4, 9, 10], [6, 7]]
    assert sorted(members for members in groups(plan) if len(members) > 1) == together
    slots = plan.apply(tokens.features)[0, [groups(plan).index(members) for members in together]]
    first = [[-0.2334, 0.1380, -0.0524], [-0.0050, -0.1301, 0.4514], [-0.2314, 0.0149, -0.1996]]
    unit = torch.nn.functional.normalize(slots, dim=-1)[:, :3]
    torch.testing.assert_close(unit, torch.tensor(first), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("early", "drops"), [(0.0, 0), (0.5, 6), (0.25, 3), (0.3, 3), (1.0, 12)])
def test_the_share_of_places_that_drop(early: float, drops: int) -> None:
    plans = [decide(ToFu(early), place(20, at=at, places=12)) for at in range(12)]
    assert [isinstance(plan, Plan) and plan.folds for plan in plans] == [False] * drops + [True] * (12 - drops)


def test_opposites_are_not_blown_up() -> None:
    """(3, 0) and (-3, 0) have no mean direction: their slot is their mean, nothing, and no infinity."""
    features = torch.tensor([[[1.0, 1], [1, 1], [2, 0], [3, 0], [-3, 0]]])
    plan = decide(ToFu(), place(5, rows=1, features=features, at=1, places=2, **HEADS), 3)
    assert groups(plan)[3] == [3, 4] and plan.apply(features)[0, 3].tolist() == [0, 0]


def test_padding_lends_no_length() -> None:
    """Tokens 0 and 1 merge into the first slot, as do cells of padding that are huge, were they asked."""
    short = place(5, rows=1, prefix=0, at=1, places=2, features=FEATURES, **HEADS)
    cells, heads = torch.full((1, 3, 2), 1e6), {name: torch.nn.functional.pad(KEYS, (0, 0, 0, 3)) for name in HEADS}
    padded = place(
        8, rows=1, prefix=0, at=1, places=2, lengths=[5], features=torch.cat([FEATURES, cells], 1), **heads
    )  # fmt: skip
    alone, among = decide(ToFu(), short, 3), decide(ToFu(), padded, 3)
    assert groups(alone) == groups(among) == [[0, 1], [2], [3, 4]]
    torch.testing.assert_close(alone.apply(short.features), among.apply(padded.features))


@pytest.mark.parametrize("law", sorted(set(encoder_battery.LAWS) - {"mass_is_conserved"}))
def test_early_places_obey_the_laws_too(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The battery decides at one place of one, which merges; all but conservation holds where tokens are dropped."""
    monkeypatch.setattr(encoder_battery, "place", partial(place, at=0, places=2))
    encoder_battery.LAWS[law](ToFu())


@pytest.mark.parametrize("early", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none(early: float) -> None:
    with pytest.raises(FewerError, match=r"early=.* is not a share of the places, in \[0, 1\]"):
        ToFu(early)
