"""Ward: the pairs whose merging loses the least energy."""

import pytest
import torch

from fewer.methods.vit.ward import Ward
from fewer.signals.heads import Attended, Heads
from fewer.types import Plan, Tokens, UnknownName
from tests.methods.vit import naive_pairs as naive
from tests.methods.vit.build import decide, groups, place


def energy(x: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return (mass.double() * x.double().square().sum(-1)).sum(-1)


def test_worked_example() -> None:
    """Behind a class token, tokens at 0, 4, 10 and 6: the even ones, at 4 and 6, propose to those at 0 and 10.

    Alone, 4 is 4 away from 0 and costs 16 / 2 = 8, and so does 6 from 10, 16 / 2 = 8. Where the one at 0 stands for
    three, joining it costs 3 / 4 * 16 = 12, and 6 / 2 * 6 = 18 to join 10: so the other goes, to (10 + 6) / 2 = 8.
    """
    features = torch.tensor([[[99.0], [0], [4], [10], [6]]])
    costs = Ward().score(place(5, rows=1, features=features)).value
    torch.testing.assert_close(costs, torch.tensor([[torch.inf, torch.inf, 8, torch.inf, 8]]))
    mass = torch.tensor([[1.0, 3, 1, 1, 1]])
    tokens = place(5, rows=1, features=features, mass=mass)
    torch.testing.assert_close(Ward().score(tokens).value[0, [2, 4]], torch.tensor([12.0, 8]))
    plan = decide(Ward(), tokens, 3)
    assert groups(plan) == [[0], [1], [2], [3, 4]] and plan.mass.tolist() == [[1, 3, 1, 2]]
    assert plan.apply(tokens.features).flatten().tolist() == [99, 0, 4, 8]


def test_small_groups_go_before_close_ones() -> None:
    """Cosine sees all alike on one ray; a pair 1 apart of ten each costs 5, a pair 2 apart of one each costs 2."""
    features = torch.tensor([[[1.0], [10], [11], [50], [52]]])
    tokens = place(5, rows=1, features=features, mass=torch.tensor([[1.0, 10, 10, 1, 1]]))
    torch.testing.assert_close(Ward().score(tokens).value[0, [2, 4]], torch.tensor([5.0, 2]))
    assert groups(decide(Ward(), tokens, 3)) == [[0], [1], [2], [3, 4]]


def cost(tokens: Tokens, row: int, x: list[list[float]], i: int, j: int) -> float:
    a, b = (1.0, 1.0) if tokens.mass is None else (float(tokens.mass[row, i]), float(tokens.mass[row, j]))
    return a * b / (a + b) * sum((u - v) ** 2 for u, v in zip(x[i], x[j], strict=True))


@pytest.mark.parametrize("metric", ["features", "keys"])
@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("n", [8, 19, 64])
def test_agrees_with_the_reference(n: int, prefix: int, metric: str) -> None:
    mass = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(n)).float()
    for tokens in (place(n, prefix=prefix, seed=n), place(n, prefix=prefix, seed=n, mass=mass)):
        leaving = (n - prefix) // 3
        plan = decide(Ward(metric), tokens, n - prefix - leaving)
        for row in range(2):
            x = tokens.features[row].double().tolist() if metric == "features" else naive.mean_keys(tokens, row)
            joins = naive.halves(n, lambda i, j: -cost(tokens, row, x, i, j), set(range(prefix)), leaving)  # noqa: B023
            assert groups(plan, row) == naive.grouped(n, joins)


def test_the_costs_are_the_energy_that_is_lost() -> None:
    """Where nobody takes in two, the sum of the costs is the energy before less the energy after, by sizes."""
    mass = torch.randint(1, 6, (2, 40), generator=torch.Generator().manual_seed(1)).float()
    near = place(40, seed=2).features  # each even token has an odd one that is nearer than all others
    near[:, 1::2] = near[:, ::2] + 0.2 * near[:, 1::2]
    tokens = place(40, prefix=0, features=near, mass=mass)
    scores, plan = Ward().score(tokens), decide(Ward(), tokens, 25)
    assert isinstance(plan, Plan) and max(len(members) for row in (0, 1) for members in groups(plan, row)) == 2
    lost = energy(tokens.features, mass) - energy(plan.apply(tokens.features), plan.mass)
    gone = torch.ones_like(mass, dtype=torch.bool).scatter(1, plan.survivors, False)
    torch.testing.assert_close(scores.value.double().where(gone, 0).sum(-1), lost, atol=1e-4, rtol=1e-5)


def test_it_loses_less_energy_than_cosines() -> None:
    """On lengths and sizes that differ, which ToMe does not look at."""
    from fewer.methods.vit.tome import ToMe

    mass = torch.randint(1, 20, (4, 64), generator=torch.Generator().manual_seed(1)).float()
    base = place(64, rows=4)
    x = base.features * torch.linspace(0.2, 3, 64).unsqueeze(-1)
    tokens = place(64, rows=4, features=x, mass=mass, **dict.fromkeys(("query", "key", "value"), x.unsqueeze(1)))
    left = {}
    for method in (Ward(), ToMe()):
        plan = decide(method, tokens, 0.7)
        left[type(method)] = energy(plan.apply(x), plan.mass)
    assert bool((left[Ward] > left[ToMe]).all())


def test_keys_are_averaged_over_heads() -> None:
    tokens = place(12, seed=4)
    other = place(12, seed=4, features=torch.zeros_like(tokens.features))
    assert groups(decide(Ward("keys"), tokens)) == groups(decide(Ward("keys"), other))
    longer = place(12, seed=4, key=tokens.signal(Heads, Attended).key * 3)
    torch.testing.assert_close(Ward("keys").score(longer).value, Ward("keys").score(tokens).value * 9)


def test_an_unknown_metric_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="metric='values': known are features, keys"):
        Ward("values")
