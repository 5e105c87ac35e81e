"""DPC-KNN: clusters around tokens that are dense and far from denser ones."""

import math

import pytest
import torch

from fewer.errors import BudgetError
from fewer.methods.vit.dpc_knn import DPCKNN
from tests.methods.vit.build import decide, groups, kept, place


def line(*at: float) -> torch.Tensor:
    return torch.tensor(at).view(1, -1, 1)


def test_worked_example() -> None:
    """Tokens at 0, 1, 3, 10 and 12, and k = 2: each one's density is exp(-half the square of its nearest distance).

    Distances 1, 1, 2, 2, 2 give exp(-1/2) twice and exp(-2) three times. The first token is the densest, so its delta
    is the greatest distance, 12. The second is as dense but later: 1. The third's denser ones are 3 and 2 away: 2. The
    fourth's are 10, 9 and, as dense but earlier, 7 away: 7. The fifth's nearest is the fourth: 2. So the centres of two
    clusters are the first and the fourth, with 3 nearer to 0 than to 10; the means are 4/3 and 11. The class token at
    100 takes no part.
    """
    tokens = place(6, rows=1, features=line(100, 0, 1, 3, 10, 12))
    dense, thin = math.exp(-0.5), math.exp(-2)
    expected = torch.tensor([12 * dense, dense, 2 * thin, 7 * thin, 2 * thin])
    torch.testing.assert_close(DPCKNN(k=2).score(tokens)[0, 1:].exp(), expected)
    plan = decide(DPCKNN(k=2), tokens, 2)
    assert kept(plan) == [0, 1, 4]
    assert groups(plan) == [[0], [1, 2, 3], [4, 5]]
    torch.testing.assert_close(plan.apply(tokens.features).flatten(), torch.tensor([100, 4 / 3, 11]))


def naive(x: list[list[float]], k: int, count: int) -> list[list[int]]:
    """The clusters, written down as the paper has them."""
    n, width = len(x), len(x[0])
    far = [[math.dist(a, b) / math.sqrt(width) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / min(k, n)) for row in far]
    score = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * (min(denser) if denser else max(map(max, far))))
    centres = sorted(sorted(range(n), key=lambda i: -score[i])[:count])
    members: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(n):
        members[i if i in members else min(centres, key=lambda c: far[i][c])].append(i)
    return list(members.values())


@pytest.mark.parametrize(("n", "keep", "k"), [(9, 3, 5), (20, 7, 5), (33, 16, 3), (4, 2, 5)])
def test_agrees_with_the_reference(n: int, keep: int, k: int) -> None:
    tokens = place(n + 1, seed=2)
    plan = decide(DPCKNN(k=k), tokens, keep)
    for row in range(2):
        found = naive(tokens.features[row, 1:].tolist(), k, keep)
        assert groups(plan, row)[1:] == [[i + 1 for i in members] for members in found]


def test_the_authors_find_the_same_clusters() -> None:
    """Golden: cluster_dpc_knn of tcformer_module/tcformer_utils.py (zengwang430521/TCFormer at 1ea72a8) on the 19
    tokens beside the class token of place(20), five clusters, k = 5."""
    tokens = place(20)
    assert groups(decide(DPCKNN(), tokens, 5))[1:] == [
        [1, 4, 8],
        [5, 9, 16, 17],
        [3, 6, 10, 12, 18],
        [7, 11, 14],
        [2, 13, 15, 19],
    ]


def test_clusters_are_means_by_size() -> None:
    """Sizes 3 and 1 at 0 and 1 make a mean of 1/4, of size 4."""
    tokens = place(5, rows=1, features=line(100, 0, 1, 10, 11), mass=torch.tensor([[1.0, 3, 1, 1, 1]]))
    plan = decide(DPCKNN(k=2), tokens, 2)
    assert groups(plan) == [[0], [1, 2], [3, 4]]
    assert plan.apply(tokens.features).flatten().tolist() == [100, 0.25, 10.5]
    assert plan.mass is not None and plan.mass.tolist() == [[1, 4, 2]]


def test_protected_patches_are_no_centres_and_nobodys_neighbours() -> None:
    """The protected token lies between the others, and still takes nobody in."""
    tokens = place(6, rows=1, features=line(100, 0, 0.1, 0.2, 9, 9.1), protect=[2])
    assert groups(decide(DPCKNN(k=2), tokens, 2)) == [[0], [1, 3], [2], [4, 5]]
    moved = place(6, rows=1, features=line(-7, 0, 55, 0.2, 9, 9.1), protect=[2])
    free = [1, 3, 4, 5]
    assert torch.equal(DPCKNN(k=2).score(tokens)[:, free], DPCKNN(k=2).score(moved)[:, free])


def test_sparse_tokens_keep_their_order() -> None:
    """Far from everybody, densities are below the smallest number there is; the pair at 1000 is still denser than the
    pair at 0, so its first is the centre of the one cluster."""
    tokens = place(5, rows=1, features=line(7, 0, 40, 1000, 1039))
    assert kept(decide(DPCKNN(k=2), tokens, 1)) == [0, 3]


def test_tokens_that_are_all_alike_go_into_one() -> None:
    tokens = place(9, features=torch.ones(2, 9, 4))
    assert sorted(map(len, groups(decide(DPCKNN(), tokens, 2)))) == [1, 1, 7]


def test_bad_neighbours() -> None:
    with pytest.raises(BudgetError, match=r"DPCKNN\(k=0\): a density takes at least one"):
        DPCKNN(k=0)
