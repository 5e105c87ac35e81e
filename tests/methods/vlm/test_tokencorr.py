"""TokenCorr: crops that repeat themselves keep less."""

import pytest
import torch
import torch.nn.functional as F

import fewer
from fewer.errors import FewerError
from fewer.methods.vlm.tokencorr import TokenCorr
from fewer.signals.visual import By, TowerView
from fewer.types import Tokens
from tests.methods.vlm.build import decide, kept, lay, place, view
from tests.vlms import FAMILIES


def said(attention: torch.Tensor, keys: torch.Tensor) -> TowerView:
    return TowerView(attention.unsqueeze(0), attention.log().unsqueeze(0), keys.unsqueeze(0))


def test_worked_example() -> None:
    """Two crops of four tokens. In the first all keys are different, in the second three are the same, and each of them
    is like two thirds of the others, which is too often: densities are 1 and 1 / 4. Of five tokens the first crop keeps
    four and the second one, its best by attention, 5; the others of its crop join it, by their attention."""
    keys = torch.cat([torch.eye(4), torch.tensor([[1.0, 0, 0, 0]] * 3 + [[0, 1, 0, 0]])])
    attention = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.05, 0.05])
    features = torch.arange(8.0).unsqueeze(1)
    tokens = place(8, features=features, layout=lay([(2, 2), (2, 2)]), tower=said(attention, keys))
    method = TokenCorr(often=0.5)
    assert [method.density(unit @ unit.T) for unit in (keys[:4], keys[4:])] == [1.0, 0.25]
    plan = decide(method, tokens, 5)
    assert kept(plan) == [0, 1, 2, 3, 5]
    expected = (0.1 * 4 + 0.2 * 5 + 0.05 * 6 + 0.05 * 7) / 0.4
    torch.testing.assert_close(plan.apply(tokens.features).flatten(), torch.tensor([0, 1, 2, 3, expected]))


def naive(tokens: Tokens, tower: TowerView, crops: list[list[int]], keep: int) -> dict[int, list[int]]:
    """Who is in the slot of every kept token."""
    keys = [F.normalize(torch.cat([head[i] for head in tower.keys]), dim=0) for i in range(len(tokens.features[0]))]
    s = tower.attention.mean(0).tolist()
    worth = []
    for mine in crops:
        alike = [sum(float(keys[i] @ keys[j]) >= 0.3 for j in mine if j != i) for i in mine]
        worth.append(sum(count <= 0.2 * (len(mine) - 1) for count in alike))
    counts = fewer.Budget.split(keep, [float(w) for w in worth], [len(mine) for mine in crops])
    slots: dict[int, list[int]] = {}
    for mine, count in zip(crops, counts, strict=True):
        stay = sorted(mine, key=lambda i: -s[i])[:count]
        slots |= {i: [i] for i in stay}
        for i in mine if stay else []:
            if i not in stay:
                slots[max(stay, key=lambda j: float(keys[i] @ keys[j]))].append(i)
    return slots


@pytest.mark.parametrize("keep", [1, 5, 20, 40])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_plain_python(keep: int, seed: int) -> None:
    layout, tower = lay([(3, 4), (4, 4), (2, 7)]), view(42, seed=seed)
    tokens = place(42, layout=layout, tower=tower)
    plan = decide(TokenCorr(alike=0.3, often=0.2), tokens, keep)
    slots = naive(tokens, tower, [list(range(12)), list(range(12, 28)), list(range(28, 42))], keep)
    assert kept(plan) == sorted(slots)
    s, x = tower.attention.mean(0), tokens.features[0]
    for i, mine in zip(kept(plan), plan.apply(tokens.features)[0], strict=True):
        who = slots[i]
        torch.testing.assert_close(mine, (s[who].unsqueeze(1) * x[who]).sum(0) / s[who].sum())


@pytest.mark.parametrize("keep", [1, 7, 11])
def test_nothing_but_repetition(keep: int) -> None:
    """Then crops keep as much as their size asks for."""
    tower = said(torch.full((12,), 0.05), torch.ones(12, 4))
    plan = decide(TokenCorr(), place(12, layout=lay([(2, 2), (2, 4)]), tower=tower), keep)
    assert len(kept(plan)) == keep


def test_a_crop_of_one_token_does_not_repeat() -> None:
    assert TokenCorr().density(torch.ones(1, 1)) == 1


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="a cosine"):
        TokenCorr(alike=2.0)
    with pytest.raises(FewerError, match="a share of a crop"):
        TokenCorr(often=-0.1)


@pytest.mark.parametrize(
    ("name", "by"), [("llava", "class"), ("llava_next", "class"), ("internvl", "class"), ("idefics3", "received")]
)
def test_in_a_model(name: str, by: By) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, TokenCorr(by=by), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3
