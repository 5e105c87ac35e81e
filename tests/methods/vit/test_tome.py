"""ToMe: even tokens join the odd ones they are most like."""

import pytest
import torch

from fewer.methods.vit.tome import ToMe
from fewer.signals.heads import Attended, Heads
from tests.methods.vit import naive_pairs as naive
from tests.methods.vit.build import decide, groups, kept, place

KEYS = torch.tensor([[[[1.0, 0], [1, 0], [0.6, 0.8], [0, 1], [0, 2]]]])
FEATURES = torch.tensor([[[10.0], [1], [2], [3], [7]]])


def test_worked_example() -> None:
    """Token 0 is the class token, so 2 and 4 propose to 1 or 3. Token 2 has the cosines 0.6 and 0.8, token 4 0 and 1.

    With three of four left, 4 joins 3: (3 + 7) / 2 = 5. With two left, 2 joins it as well: (2 + 3 + 7) / 3 = 4.
    """
    tokens = place(5, rows=1, query=KEYS, key=KEYS, value=KEYS, features=FEATURES)
    scores = ToMe().score(tokens)
    torch.testing.assert_close(scores.value, torch.tensor([[torch.inf, torch.inf, -0.8, torch.inf, -1.0]]))
    assert scores.partner[0, [2, 4]].tolist() == [3, 3]
    plan = decide(ToMe(), tokens, 3)
    assert groups(plan) == [[0], [1], [2], [3, 4]] and plan.mass.tolist() == [[1, 1, 1, 2]]
    assert plan.apply(tokens.features).flatten().tolist() == [10, 1, 2, 5]
    plan = decide(ToMe(), tokens, 2)
    assert groups(plan) == [[0], [1], [2, 3, 4]] and plan.mass.tolist() == [[1, 1, 3]]
    torch.testing.assert_close(plan.apply(tokens.features).flatten(), torch.tensor([10.0, 1, 4]))


def test_larger_tokens_weigh_more() -> None:
    """Token 3 stands for three: (3 * 3 + 7) / 4 = 4."""
    mass = torch.tensor([[1.0, 1, 1, 3, 1]])
    tokens = place(5, rows=1, query=KEYS, key=KEYS, value=KEYS, features=FEATURES, mass=mass)
    plan = decide(ToMe(), tokens, 3)
    assert plan.apply(tokens.features).flatten().tolist() == [10, 1, 2, 4] and plan.mass.tolist() == [[1, 1, 1, 4]]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [8, 19, 64])
def test_agrees_with_the_reference(n: int, prefix: int) -> None:
    mass = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(n)).float()
    tokens = place(n, prefix=prefix, seed=n, mass=mass)
    leaving = (n - prefix) // 3
    plan = decide(ToMe(), tokens, n - prefix - leaving)
    for row in range(2):
        keys = naive.mean_keys(tokens, row)
        joins = naive.halves(n, lambda i, j: naive.cosine(keys[i], keys[j]), set(range(prefix)), leaving)  # noqa: B023
        expected = naive.grouped(n, joins)
        assert groups(plan, row) == expected
        slots = [naive.mean(tokens.features[row], members, mass[row].tolist()) for members in expected]
        torch.testing.assert_close(plan.apply(tokens.features)[row], torch.tensor(slots))


# Golden: bipartite_soft_matching and merge_wavg of facebookresearch/ToMe tome/merge.py (af95e4b), re-derived from
# reading, on the head-mean keys of place(14, rows=1, seed=7) with masses 1 to 14 and r=5: the groups that merged, and
# the first channel of every slot, slots sorted by their first member.
GOLDEN = {
    0: (
        [[0, 1, 8], [2, 4, 9, 10]],
        [-0.6165, -0.2843, 0.321, 0.1212, -0.7252, -0.9817, 1.2905, 1.5449, -1.173],
    ),
    1: (
        [[1, 8], [2, 4, 9, 10], [6, 7]],
        [-0.1652, -0.6575, -0.2843, 0.321, 0.1212, -0.862, 1.2905, 1.5449, -1.173],
    ),
    2: (
        [[2, 4, 9, 10], [6, 7], [8, 13]],
        [-0.1652, -0.536, -0.2843, 0.321, 0.1212, -0.862, -0.9819, 1.2905, 1.5449],
    ),
}


@pytest.mark.parametrize("prefix", GOLDEN)
def test_the_authors_merge_the_same(prefix: int) -> None:
    """Without a class token, with one, and with a distillation token too."""
    tokens = place(14, rows=1, prefix=prefix, seed=7, mass=torch.arange(1.0, 15).unsqueeze(0))
    plan = decide(ToMe(), tokens, 14 - prefix - 5)
    together, first = GOLDEN[prefix]
    found = sorted(groups(plan))
    assert [members for members in found if len(members) > 1] == together
    slots = plan.apply(tokens.features)[0, :, 0].tolist()
    by_member = [slots[groups(plan).index(members)] for members in found]
    torch.testing.assert_close(torch.tensor(by_member), torch.tensor(first), atol=1e-4, rtol=0)


def test_at_most_the_even_tokens_leave() -> None:
    """Of twelve patches behind a class token, tokens 2, 4, ... 12 may leave; asked for two, seven stay."""
    plan = decide(ToMe(), place(13), 2)
    assert plan.counts.tolist() == [7, 7] and kept(plan) == [0, 1, 3, 5, 7, 9, 11]


def test_only_directions_of_keys_matter() -> None:
    tokens = place(21, seed=3)
    longer = place(21, seed=3, key=tokens.signal(Heads, Attended).key * 37)
    assert groups(decide(ToMe(), tokens)) == groups(decide(ToMe(), longer))


def test_nobody_to_join_means_all_stay() -> None:
    """Two tokens, a class token and one patch: nobody can leave."""
    assert decide(ToMe(), place(2), 1).counts.tolist() == [2, 2]
    assert decide(ToMe(), place(1, prefix=0), 1).counts.tolist() == [1, 1]
