"""Recoverable Compression: attention, then the question, then centres of what is left."""

import pytest
import torch
import torch.nn.functional as F

import fewer
from fewer.errors import FewerError
from fewer.methods.vlm.recoverable_compression import RecoverableCompression
from fewer.score.outliers import local_outlier_factor, outliers
from fewer.signals.visual import By, Question, Tower, TowerView
from fewer.types import Tokens
from tests.methods.vlm.build import decide, kept, place, random
from tests.vlms import FAMILIES


def test_outliers_are_those_of_scikit_learn() -> None:
    """Made with `LocalOutlierFactor(n_neighbors=3)` of scikit-learn."""
    values = torch.tensor([0.0, 0.11, 0.21, 0.32, 0.36, 0.5, 0.57, 0.9, 2.0, 2.1, 5.0])
    expected = [1.33342, 1.19828, 0.99265, 0.88588, 0.96208, 1.08395, 1.23056, 2.22141, 3.50552, 3.60007, 4.24697]
    torch.testing.assert_close(local_outlier_factor(values, 3), torch.tensor(expected), atol=1e-4, rtol=0)
    assert outliers(values, 3) == 4
    assert outliers(torch.ones(9), 3) == 0
    assert outliers(torch.ones(1), 3) == 0


def scene() -> Tokens:
    """Twenty-four tokens. The tower looks at 3, and the question is that of 7; all others are a crowd, in which 5 and 6
    get a little more."""
    attention = torch.full((24,), 0.01) + torch.arange(24) * 1e-4
    attention[3], attention[5], attention[6] = 0.4, 0.02, 0.021
    features = torch.eye(24) + 0.001 * random(24, 24)
    features[7, 15] = 3.0
    return place(24, features=features, tower=attention, question=torch.eye(24)[15].expand(1, 4, 24))


def test_worked_example() -> None:
    """Attention has three outliers, 3, 5 and 6. Likeness to the question has two, 15 and 7: a share of 2 / 24, which of
    the 21 others is one token. The rest is a crowd and has none, so it is one token. Where five stay, these do: 3, 5
    and 6, then 15, and the mean of all others by attention, at the place of 23, which has most of it."""
    tokens = scene()
    plan = decide(RecoverableCompression(), tokens, 5)
    assert kept(plan) == [3, 5, 6, 15, 23]
    a = RecoverableCompression().score(tokens)[0]
    rest = [i for i in range(24) if i not in (3, 5, 6, 15)]
    mean = (a[rest].unsqueeze(1) * tokens.features[0, rest]).sum(0) / a[rest].sum()
    folded = plan.apply(tokens.features)[0]
    torch.testing.assert_close(folded[-1], mean)
    torch.testing.assert_close(folded[:-1], tokens.features[0, [3, 5, 6, 15]])


def made(n: int = 80, seed: int = 1) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=draw) * 2
    attention = torch.cat([logits, torch.ones(1)]).softmax(0)[:n]
    keys, features = torch.randn(1, n, 16, generator=draw), torch.randn(n, 16, generator=draw)
    view = TowerView(attention.unsqueeze(0), logits.unsqueeze(0), keys)
    return place(n, features=features, tower=view, question=torch.randn(1, 5, 16, generator=draw))


def test_official_is_the_authors() -> None:
    """Made with a port of the authors' `token_recycling_with_text_in_vision_and_clustring` (Recoverable-Compression,
    llava/model/multimodal_encoder/clip_encoder.py, d927594) for one head, with this question in the place of CLIP's: 21
    tokens are kept, 9 recovered, one centre made of 14, and one token of the rest, here at the place of 19."""
    tokens = made()
    plan = decide(RecoverableCompression(official=True), tokens, 32)
    both = [9, 13, 15, 16, 18, 20, 21, 22, 23, 24, 29, 32, 39, 41, 44, 46, 48, 49, 52, 53, 54, 55, 57, 58, 60, 61, 66]
    assert kept(plan) == sorted([*both, 70, 73, 78, 14, 19])
    sums = [2.4438, -0.7656, -4.1919, 0.0832, -0.1778, 2.5424, -0.0282, 1.3478, -5.9964, -3.8121, 2.8238]
    torch.testing.assert_close(
        plan.apply(tokens.features)[0, :11].sum(-1), torch.tensor(sums), atol=2e-4, rtol=0
    )  # 14 is the third of them and 19 the seventh


def naive(tokens: Tokens, keep: int) -> torch.Tensor:
    """The mixtures, token by token."""
    method = RecoverableCompression()
    a, x = method.score(tokens)[0], tokens.features[0]
    asked = F.normalize(tokens.signals[Question][0].mean(0), dim=0)
    like = [float(F.normalize(row, dim=0) @ asked) for row in x]
    parts = fewer.Budget.split(keep, [float(p) for p in method._parts(a, torch.tensor(like))], [keep] * 3)
    free = list(range(len(a)))
    chosen = sorted(free, key=lambda i: -float(a[i]))[: parts[0]]
    free = [i for i in free if i not in chosen]
    back = sorted(free, key=lambda i: -like[i])[: parts[1]]
    free = [i for i in free if i not in back]
    out = {i: x[i] for i in chosen + back}
    if parts[2]:
        keys = [F.normalize(row, dim=0) for row in tokens.signals[Tower].keys[0]]
        centres = sorted(free, key=lambda i: -float(a[i]))[: parts[2] - 1]
        for i in centres:
            near = sorted(
                (j for j in free if j != i), key=lambda j: -(float(keys[i] @ keys[j]) + 50 / 768**0.5 * like[j])
            )[:32]
            total = 1 + sum(float(a[j]) for j in near)
            out[i] = (x[i] + sum(a[j] * x[j] for j in near)) / total
        rest = sorted((i for i in free if i not in centres), key=lambda i: -float(a[i]))
        out[rest[0]] = sum(a[j] * x[j] for j in rest) / sum(float(a[j]) for j in rest)
    return torch.stack([out[i] for i in sorted(out)])


@pytest.mark.parametrize("keep", [1, 2, 9, 40, 79])
def test_agrees_with_plain_python(keep: int) -> None:
    tokens = made(seed=4)
    mine = decide(RecoverableCompression(), tokens, keep).apply(tokens.features)[0]
    torch.testing.assert_close(mine, naive(tokens, keep), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", [1, 5, 11])
@pytest.mark.parametrize("official", [False, True])
def test_tokens_that_are_all_the_same(keep: int, official: bool) -> None:
    tokens = place(12, features=torch.ones(12, 4), tower=[1 / 12] * 12, question=torch.ones(1, 2, 4))
    plan = decide(RecoverableCompression(official=official), tokens, keep)
    assert len(kept(plan)) == keep
    if not official:
        torch.testing.assert_close(plan.apply(tokens.features), torch.ones(1, keep, 4))


def test_mixtures_are_means() -> None:
    plan = decide(RecoverableCompression(), made(seed=5), 50)
    torch.testing.assert_close(plan.matrix.sum(-1), torch.ones(1, 50))


def test_bad_arguments() -> None:
    with pytest.raises(FewerError, match="at least 1 token"):
        RecoverableCompression(nearest=0)


@pytest.mark.parametrize(("name", "by"), [("llava", "class"), ("internvl", "class"), ("qwen3_vl", "received")])
def test_in_a_model(name: str, by: By) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, RecoverableCompression(by=by), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3
