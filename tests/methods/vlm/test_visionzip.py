"""VisionZip: dominant tokens by the tower's attention, contextual ones by folding."""

import pytest
import torch
import torch.nn.functional as F

import fewer
from fewer.errors import FewerError
from fewer.methods.vlm.visionzip import VisionZip
from fewer.signals.visual import By, TowerView
from fewer.types import Tokens
from tests.methods.vlm.build import decide, kept, place, view
from tests.vlms import FAMILIES


def test_worked_example() -> None:
    """The class token looks at 2 most, so of two tokens it is dominant. Of the others, 0, 1 and 3, the first is the
    target, and 1 and 3 join it: (10 + 20 + 60) / 3 = 30, or, by the authors, 10 + (20 + 60) / 2 = 50."""
    tower = TowerView(torch.tensor([[0.1, 0.2, 0.4, 0.3]]), torch.zeros(1, 4), torch.ones(1, 4, 2))
    tokens = place(4, features=torch.tensor([[10.0], [20], [5], [60]]), tower=tower)
    plan = decide(VisionZip(contextual=0.5), tokens, 2)
    assert kept(plan) == [0, 2]
    assert plan.apply(tokens.features).flatten().tolist() == pytest.approx([30, 5])
    official = decide(VisionZip(contextual=0.5, official=True), tokens, 2)
    assert official.apply(tokens.features).flatten().tolist() == pytest.approx([50, 5])


def naive(tokens: Tokens, tower: TowerView, keep: int, folded: int, official: bool) -> dict[int, torch.Tensor]:
    n, x = len(tokens.features[0]), tokens.features[0]
    s = [sum(float(head[i]) for head in tower.attention) for i in range(n)]
    dominant = sorted(range(n), key=lambda i: -s[i])[: keep - folded]
    rest = [i for i in range(n) if i not in dominant]
    targets = rest[:: max(1, len(rest) // folded)][:folded] if folded else []
    keys = [F.normalize(tower.keys[:, i].mean(0), dim=0) for i in range(n)]
    joined: dict[int, list[int]] = {i: [] for i in targets}
    for i in rest if folded else []:
        if i not in targets:
            joined[max(targets, key=lambda j: float(keys[i] @ keys[j]))].append(i)
    out = {i: x[i] for i in dominant}
    for i, others in joined.items():
        if official:
            out[i] = x[i] + (x[others].mean(0) if others else 0)
        else:
            out[i] = x[[i, *others]].mean(0)
    return out


@pytest.mark.parametrize("keep", [1, 2, 7, 20, 34])
@pytest.mark.parametrize("official", [False, True])
def test_agrees_with_plain_python(keep: int, official: bool) -> None:
    tower = view(36, seed=3)
    tokens = place(36, tower=tower)
    plan = decide(VisionZip(official=official), tokens, keep)
    expected = naive(tokens, tower, keep, min(int(10 / 64 * keep), keep - 1), official)
    assert kept(plan) == sorted(expected)
    torch.testing.assert_close(plan.apply(tokens.features)[0], torch.stack([expected[i] for i in sorted(expected)]))


def test_official_is_the_authors() -> None:
    """Made with a port of the authors' `CLIPVisionTower_VisionZip.forward` (VisionZip, visionzip/clip_encoder.py,
    3151f6d) on these tensors in the place of the tower's states, the class token left out: 8 dominant tokens, 3
    contextual ones, and the sums of the latter's features. They stand behind the dominant ones there, here between."""
    tokens = place(36, tower=True, seed=36)
    plan = decide(VisionZip(contextual=3.5 / 11, official=True), tokens, 11)
    assert kept(plan) == sorted([0, 1, 10, 20, 23, 26, 29, 30, 2, 12, 22])
    sums = plan.apply(tokens.features)[0].sum(-1)
    at = [kept(plan).index(i) for i in (2, 12, 22)]
    torch.testing.assert_close(sums[at], torch.tensor([-3.7255, 1.3323, -0.7307]), atol=2e-4, rtol=0)
    first = torch.tensor([-0.0704, -0.6776, -1.386])
    torch.testing.assert_close(plan.apply(tokens.features)[0, at[0], :3], first, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("keep", "folded"), [(64, 10), (128, 20), (192, 30)])
def test_counts_of_the_paper(keep: int, folded: int) -> None:
    """54 + 10, 108 + 20 and 162 + 30 of 576."""
    plan = decide(VisionZip(official=True), place(576, tower=True), keep)
    sizes = torch.bincount(plan.slot[0][plan.slot[0] >= 0], minlength=keep)
    assert len(sizes) == keep
    assert int(plan.slot.ge(0).sum()) == 576
    assert int((sizes > 1).sum()) <= folded  # a target may have nobody join it


def test_tokens_that_are_all_the_same() -> None:
    tower = TowerView(torch.full((2, 12), 1 / 12), torch.zeros(2, 12), torch.ones(2, 12, 4))
    tokens = place(12, features=torch.ones(12, 3), tower=tower)
    for keep in (1, 5, 11):
        plan = decide(VisionZip(contextual=0.5), tokens, keep)
        torch.testing.assert_close(plan.apply(tokens.features), torch.ones(1, keep, 3))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_shares_are_shares(share: float) -> None:
    with pytest.raises(FewerError, match="a share of what stays"):
        VisionZip(contextual=share)


@pytest.mark.parametrize(("name", "by"), [("llava", "class"), ("internvl", "class"), ("smolvlm", "received")])
def test_in_a_model(name: str, by: By) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, VisionZip(by=by), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3
