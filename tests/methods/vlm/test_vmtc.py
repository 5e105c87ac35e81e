"""VMTC: primary tokens stay, the others become cluster means."""

import pytest
import torch
import torch.nn.functional as F

import fewer
from fewer.errors import FewerError
from fewer.methods.vlm.vmtc import VMTC
from fewer.reduce.kmeans import by_cosine, folded
from fewer.signals.visual import By
from tests.methods.vlm.build import decide, kept, place, random
from tests.vlms import FAMILIES


def test_worked_example() -> None:
    """The tower looks at 4 and 0. The others point two ways: 1 and 3 to the right, 2 and 5 up. Of four, 4 and 0 stay as
    they are; 1 and 3, with attention 0.1 and 0.3, become (0.1 * 1 + 0.3 * 3) / 0.4 = 2.5 to the right, in the place of
    3; 2 and 5, with 0.05 each, 3 up, in the place of 2."""
    features = torch.tensor([[5.0, 5], [1, 0], [0, 2], [3, 0], [7, 7], [0, 4]])
    tokens = place(6, features=features, tower=[0.4, 0.1, 0.05, 0.3, 0.5, 0.05])
    plan = decide(VMTC(), tokens, 4)
    assert kept(plan) == [0, 2, 3, 4]
    assert plan.slot.tolist() == [[0, 2, 1, 2, 3, 1]]
    torch.testing.assert_close(plan.apply(tokens.features)[0], torch.tensor([[5.0, 5], [0, 3], [2.5, 0], [7, 7]]))


def naive(x: torch.Tensor, k: int) -> list[int]:
    rows = [F.normalize(row, dim=0) for row in x]
    centres = [rows[i * len(rows) // k] for i in range(k)]
    label: list[int] = []
    for _ in range(20):
        like = [[float(row @ centre) for centre in centres] for row in rows]
        before, label = label, [max(range(k), key=lambda c: (row[c], -c)) for row in like]
        best = {c: max((i for i in range(len(rows)) if label[i] == c), key=lambda i: like[i][label[i]]) for c in label}
        spare = sorted(set(range(len(rows))) - set(best.values()), key=lambda i: max(like[i]))
        for c in (c for c in range(k) if c not in best):
            label[spare.pop(0)] = c
        if label == before:
            break
        members = [[rows[i] for i in range(len(rows)) if label[i] == c] for c in range(k)]
        centres = [F.normalize(torch.stack(mine).sum(0), dim=0) for mine in members]
    return label


@pytest.mark.parametrize("k", [1, 3, 12, 29, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_clusters_agree_with_plain_python(k: int, seed: int) -> None:
    x = random(30, 4, seed=seed)
    label = by_cosine(x, k)
    assert label.tolist() == naive(x, k)
    assert set(label.tolist()) == set(range(k))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_no_cluster_is_empty_where_all_are_the_same(k: int) -> None:
    assert set(by_cosine(torch.ones(7, 3), k).tolist()) == set(range(k))
    assert set(by_cosine(torch.zeros(7, 3), k).tolist()) == set(range(k))


@pytest.mark.parametrize("keep", [1, 2, 9, 23])
@pytest.mark.parametrize("primary", [0.0, 0.5, 1.0])
def test_slots_are_means_by_attention(keep: int, primary: float) -> None:
    tokens = place(24, tower=True)
    method = VMTC(primary)
    plan = decide(method, tokens, keep)
    assert len(kept(plan)) == keep
    s, x = method.score(tokens)[0], tokens.features[0]
    for slot, mine in enumerate(plan.apply(tokens.features)[0]):
        who = (plan.slot[0] == slot).nonzero().flatten()
        torch.testing.assert_close(mine, (s[who].unsqueeze(1) * x[who]).sum(0) / s[who].sum())
        assert int(plan.survivors[0, slot]) == int(who[s[who].argmax()])
    assert bool((plan.slot >= 0).all()) == (primary < 1.0)


def test_attention_of_nothing() -> None:
    plan = folded(torch.tensor([0, 0, 1, -1]), torch.zeros(4))
    assert plan.weight.tolist() == [[0.5, 0.5, 1.0, 0.0]]


def test_shares_are_shares() -> None:
    with pytest.raises(FewerError, match="from 0 to 1"):
        VMTC(1.5)


@pytest.mark.parametrize(("name", "by"), [("llava", "class"), ("llava_next", "class"), ("qwen2_5_vl", "received")])
def test_in_a_model(name: str, by: By) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, VMTC(by=by), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3
