"""PiToMe: who stands in a crowd may merge."""

import math
from functools import partial

import pytest
import torch

from fewer.methods.vit.pitome import PiToMe
from fewer.types import FewerError, Tokens, UnknownName
from tests.laws import encoder_battery
from tests.methods.vit import naive_pairs as naive
from tests.methods.vit.build import decide, groups, kept, place

KEYS = torch.tensor([[[[1.0, 0], [1, 0], [0.8, 0.6], [0.6, 0.8], [-0.6, 0.8]]]])
HEADS = {"query": KEYS, "key": KEYS, "value": KEYS}
FLAT = (0.5, 0.0)
"""A margin of a half at every depth."""


def here(layer: int) -> Tokens:
    return place(5, rows=1, layer=layer, layers=4, features=torch.tensor([[[9.0], [1], [2], [3], [4]]]), **HEADS)


def test_worked_example() -> None:
    """Behind the class token, tokens 1 to 4 have the cosines 1-2 0.8, 1-3 0.6, 1-4 -0.6, 2-3 0.96, 2-4 0, 3-4 0.28.

    ELU(c - 0.5) is 0.3, 0.1, -0.667, 0.46, -0.393 and -0.197 for these, and 0.5 for oneself: the energies are 0.058,
    0.217, 0.216 and -0.190. By energy the order is 2, 3, 1, 4. To lose one, 2 and 3 are mergeable: 2 joins 3. To lose
    two, A is 2 and 1, B is 3 and 4: both join 3, at 0.96 and 0.6, and (1 + 2 + 3) / 3 = 2.
    """
    tokens, method = here(layer=3), PiToMe(margin=FLAT)
    energies = torch.tensor([0.0582, 0.2166, 0.2156, -0.1895])
    torch.testing.assert_close(method.score(tokens)[0, 1:], -energies, atol=1e-4, rtol=0)
    plan = decide(method, tokens, 3)
    assert groups(plan) == [[0], [1], [2, 3], [4]] and kept(plan) == [0, 1, 3, 4]
    plan = decide(method, tokens, 2)
    assert groups(plan) == [[0], [1, 2, 3], [4]] and kept(plan) == [0, 3, 4]
    torch.testing.assert_close(plan.apply(tokens.features).flatten(), torch.tensor([9.0, 2, 4]))
    assert plan.mass.tolist() == [[1, 3, 1]]


def test_worked_example_of_text() -> None:
    """The same tokens. exp(-((1 - c) / 0.5)^2 / 2) summed over them is 2.655, 3.055, 3.077 and 1.496: the order is
    3, 2, 1, 4. To lose one, 3 joins 2; to lose two, A is 3 and 2, B is 1 and 4: both join 1, and the mean is 2."""
    tokens, method = here(layer=0), PiToMe("text", margin=FLAT)
    sums = torch.tensor([2.6552, 3.0552, 3.0775, 1.4959]) / 4 / (0.5 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(method.score(tokens)[0, 1:], -sums, atol=1e-4, rtol=0)
    assert kept(decide(method, tokens, 3)) == [0, 1, 2, 4]
    plan = decide(method, tokens, 2)
    assert groups(plan) == [[0], [1, 2, 3], [4]] and kept(plan) == [0, 1, 4]
    torch.testing.assert_close(plan.apply(tokens.features).flatten(), torch.tensor([9.0, 2, 4]))


def test_early_blocks_protect_nobody() -> None:
    """A crowd of five near (1, 0), and a pair at (0, 1) that points the same way: early the pair merges first, for only
    likeness counts; late it is not mergeable, for its energy is less, and two of the crowd merge."""
    keys = torch.tensor([[[[1.0, 0], [1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4], [0, 1], [0, 2]]]])
    early, late = (
        place(7, rows=1, prefix=0, layer=layer, layers=4, query=keys, key=keys, value=keys) for layer in (1, 2)
    )
    method = PiToMe(margin=FLAT)
    assert [members for members in groups(decide(method, early, 6)) if len(members) > 1] == [[5, 6]]
    together = [members for members in groups(decide(method, late, 6)) if len(members) > 1]
    assert len(together) == 1 and set(together[0]) < {0, 1, 2, 3, 4}


def energies(keys: list[list[float]], free: list[int], margin: float, text: bool) -> list[float]:
    rated = []
    for i in free:
        total = 0.0
        for j in free:
            c = naive.cosine(keys[i], keys[j])
            if text:
                wide = 1 - margin
                total += math.exp(-(((1 - c) / wide) ** 2) / 2) / wide / math.sqrt(2 * math.pi)
            else:
                total += c - margin if c > margin else math.exp(c - margin) - 1
        rated.append(total / len(free))
    return rated


def reference(tokens: Tokens, row: int, prefix: int, leaving: int, margin: float, text: bool) -> list[list[int]]:
    keys, n = naive.mean_keys(tokens, row), tokens.features.shape[1]
    free = list(range(prefix, n))
    energy = energies(keys, free, margin, text)
    order = sorted(free, key=lambda i: -energy[i - prefix])
    if text:
        a, b = order[:leaving], order[leaving : 2 * leaving]
    elif 2 * tokens.site.layer < tokens.site.layers:
        a, b = order[::2], order[1::2]
    else:
        a, b = order[: 2 * leaving : 2], order[1 : 2 * leaving : 2]
    pairs = [max((naive.cosine(keys[i], keys[j]), j) for j in b) for i in a]
    best = sorted(zip(pairs, a, strict=True), reverse=True)[:leaving]
    return naive.grouped(n, {i: j for (_, j), i in best})


@pytest.mark.parametrize("layer", [0, 2, 3, 4])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("n", [8, 19, 48])
@pytest.mark.parametrize("variant", ["vision", "text"])
def test_agrees_with_the_reference(variant: str, n: int, prefix: int, layer: int) -> None:
    """Of five blocks the first three are early."""
    start, fall = (0.75, 0.75) if variant == "vision" else (0.5, 0.25)
    mass = torch.randint(1, 5, (2, n), generator=torch.Generator().manual_seed(n)).float()
    tokens = place(n, prefix=prefix, seed=n, layer=layer, layers=5, mass=mass)
    leaving = (n - prefix) // 3
    plan = decide(PiToMe(variant, margin=(start, fall)), tokens, n - prefix - leaving)
    for row in range(2):
        expected = reference(tokens, row, prefix, leaving, start - fall * layer / 5, variant == "text")
        assert groups(plan, row) == expected
        slots = [naive.mean(tokens.features[row], members, mass[row].tolist()) for members in expected]
        torch.testing.assert_close(plan.apply(tokens.features)[row], torch.tensor(slots))


# Golden: pitome_vision (with and without use_bsm_pitome) and pitome_text of hchautran/PiToMe algo/pitome/merge.py
# (550b5de), re-derived from reading, with merge_wavg, on the head-mean keys of place(14, rows=1, seed=7, layers=12)
# with r=5: three of the energies, the groups that merged, and the first channel of every slot, by its first member.
GOLDEN = {
    ("vision", None, 2): (
        [-0.4316, -0.3905, -0.4865],
        [[1, 8], [2, 4], [3, 11], [5, 13], [9, 10]],
        [-0.1652, -0.6103, 0.3493, 0.8058, -0.5259, -0.7252, -0.9817, -0.3671, 1.5449],
    ),
    ("vision", None, 8): (
        [-0.1354, -0.0736, -0.2166],
        [[1, 5, 8], [2, 7], [4, 9, 10]],
        [-0.1652, -0.3664, 0.5007, 0.3210, -0.6728, -0.7252, 1.2905, 1.5449, -1.1730],
    ),
    ("text", FLAT, 1): (
        [0.2305, 0.2696, 0.1779],
        [[1, 8], [2, 7], [4, 9, 10], [5, 13]],
        [-0.1652, -0.6103, 0.5007, 0.3210, -0.6728, -0.5259, -0.7252, 1.2905, 1.5449],
    ),
}


@pytest.mark.parametrize(("variant", "margin", "layer"), GOLDEN)
def test_the_authors_merge_the_same(variant: str, margin: tuple[float, float] | None, layer: int) -> None:
    tokens, method = place(14, rows=1, seed=7, layer=layer, layers=12), PiToMe(variant, margin)
    energy, together, first = GOLDEN[variant, margin, layer]
    torch.testing.assert_close(-method.score(tokens)[0, 1:4], torch.tensor(energy), atol=1e-4, rtol=0)
    plan = decide(method, tokens, 8)
    found = sorted(groups(plan))
    assert [members for members in found if len(members) > 1] == together
    slots = plan.apply(tokens.features)[0, :, 0].tolist()
    by_member = torch.tensor([slots[groups(plan).index(members)] for members in found])
    torch.testing.assert_close(by_member, torch.tensor(first), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("variant", ["vision", "text"])
def test_half_of_those_that_may_leave(variant: str, layer: int) -> None:
    """Seven patches are open: three leave at most, however few are asked for."""
    plan = decide(PiToMe(variant), place(10, prefix=3, layer=layer), 2)
    assert plan.counts.tolist() == [7, 7]
    assert decide(PiToMe(variant), place(2, layer=layer), 1).counts.tolist() == [2, 2]


def test_margins_fall_with_depth() -> None:
    """Tokens at right angles: 0 is as far below the margin as the margin is high; a first block's is 0.9."""
    keys = torch.eye(4)[None, None]
    tokens = [place(4, rows=1, prefix=0, layer=at, layers=4, query=keys, key=keys, value=keys) for at in (0, 2)]
    for one, margin in zip(tokens, (0.9, 0.45), strict=True):
        energy = (1 - margin + 3 * (math.exp(-margin) - 1)) / 4
        torch.testing.assert_close(PiToMe().score(one), torch.full((1, 4), -energy))
    assert bool((PiToMe().score(tokens[0]) == PiToMe(margin=(0.9, 0.9)).score(tokens[0])).all())
    assert bool((PiToMe("text").score(tokens[1]) == PiToMe("text", margin=(0.9, 0.25)).score(tokens[1])).all())


def test_where_it_acts() -> None:
    """Vision at every block, text at the first three."""
    assert PiToMe().places(12) == list(range(12)) and PiToMe("text").places(12) == [0, 1, 2]
    assert PiToMe("text").places(2) == [0, 1]


@pytest.mark.parametrize("law", encoder_battery.LAWS)
@pytest.mark.parametrize("method", [PiToMe(), PiToMe("text")], ids=["late", "text"])
def test_the_other_variants_obey_the_laws_too(method: PiToMe, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The battery decides in an early block; here in a late one."""
    monkeypatch.setattr(encoder_battery, "place", partial(place, layer=3))
    encoder_battery.LAWS[law](method)


def test_bad_arguments() -> None:
    with pytest.raises(UnknownName, match="variant='audio': known are vision, text"):
        PiToMe("audio")
    for margin in ((1.0, 0.5), (0.5, 2.0), (0.5, -0.5), (math.nan, 0.0)):
        with pytest.raises(FewerError, match=r"margin=.*: margins are cosines below 1 at both ends"):
            PiToMe(margin=margin)
