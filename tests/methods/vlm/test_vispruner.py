"""VisPruner: half by the tower's attention, half by being unlike the rest."""

import pytest
import torch

import fewer
from fewer.errors import FewerError
from fewer.methods.vlm.vispruner import VisPruner
from fewer.signals.visual import By
from fewer.types import Tokens
from tests.methods.vlm.build import decide, kept, lay, place
from tests.vlms import FAMILIES


def test_worked_example() -> None:
    """By attention the six tokens are 5, 0, 1, 2, 3, 4. Of five, 5 and 0 stay for it. Of the rest every second, 1 and
    3, is compared to those between, 2 and 4: 1 is 2 over again, 3 has a cosine of 0.6 with 4, so 1 leaves. Of four, two
    have to leave, and both that were compared do."""
    features = torch.tensor([[9.0, 0], [1, 0], [1, 0], [0, 1], [0.8, 0.6], [9, 1]])
    tokens = place(6, features=features, tower=[0.3, 0.15, 0.1, 0.06, 0.04, 0.35])
    assert kept(decide(VisPruner(), tokens, 5)) == [0, 2, 3, 4, 5]
    assert kept(decide(VisPruner(), tokens, 4)) == [0, 2, 4, 5]


def naive(tokens: Tokens, scores: list[float], keep: int, share: float) -> list[int]:
    features = [row / row.norm() for row in tokens.features[0]]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    first = int(keep * share)
    chosen, rest = order[:first], order[first:]
    while len(rest) > keep - first > 0:
        asked, others = rest[::2], rest[1::2]
        out = min(8, len(rest) - (keep - first), len(asked))
        likest = {i: max(float(features[i] @ features[j]) for j in others) for i in asked}
        rest = sorted(asked, key=lambda i: -likest[i])[out:] + others
    return sorted(chosen + rest[: keep - first])


@pytest.mark.parametrize(("keep", "share"), [(1, 0.5), (5, 0.5), (12, 0.75), (20, 0.0), (34, 0.5), (9, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_plain_python(keep: int, share: float, seed: int) -> None:
    tokens = place(35, tower=True, seed=seed)
    scores = VisPruner().score(tokens)[0].tolist()
    assert kept(decide(VisPruner(share), tokens, keep)) == naive(tokens, scores, keep, share)


def test_chooses_as_the_authors_do() -> None:
    """Made with the loop of the authors' `encode_images` (VisPruner, llava/model/llava_arch.py, aefa01a), on the same
    features and attention: 64 tokens of `place(64, tower=True, seed=64)`."""
    tokens = place(64, tower=True, seed=64)
    half = [0, 3, 4, 8, 9, 10, 11, 12, 13, 15, 18, 22, 24, 26, 29, 34, 35, 39, 40, 41, 46, 48, 49, 60]
    none = [0, 1, 3, 7, 8, 9, 10, 11, 12, 20, 22, 24, 25, 26, 27, 29]
    none += [30, 35, 37, 38, 39, 40, 41, 42, 43, 46, 52, 56, 57, 58, 61, 62]
    assert kept(decide(VisPruner(), tokens, 24)) == half
    assert kept(decide(VisPruner(0.0), tokens, 32)) == none
    assert kept(decide(VisPruner(), tokens, 16)) == [0, 3, 7, 10, 11, 13, 14, 18, 25, 33, 39, 48, 52, 57, 60, 61]


def test_every_crop_is_done_alone() -> None:
    """Nine tokens of 18 + 9 are six and three, each as if the crop were all there is."""
    layout = lay([(3, 6), (3, 3)])
    tokens = place(27, layout=layout, tower=True)
    scores, found = VisPruner().score(tokens)[0], kept(decide(VisPruner(), tokens, 9))
    for mine, count in ((torch.arange(18), 6), (torch.arange(18, 27), 3)):
        alone = place(len(mine), features=tokens.features[0, mine], tower=scores[mine])
        assert [i for i in found if i in mine] == [int(mine[i]) for i in kept(decide(VisPruner(), alone, count))]


def test_all_for_attention_is_fastervlm() -> None:
    tokens = place(30, tower=True)
    best = VisPruner().score(tokens)[0].topk(7).indices.sort().values
    assert kept(decide(VisPruner(1.0), tokens, 7)) == best.tolist()


def test_tokens_that_are_all_the_same() -> None:
    plan = decide(VisPruner(), place(20, features=torch.ones(20, 4), tower=[0.05] * 20), 9)
    assert len(kept(plan)) == 9


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_shares(share: float) -> None:
    with pytest.raises(FewerError, match="from 0 to 1"):
        VisPruner(share)


@pytest.mark.parametrize(("name", "by"), [("llava", "class"), ("llava_next", "class"), ("qwen2_vl", "received")])
def test_in_a_model(name: str, by: By) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, VisPruner(by=by), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3
    assert sum(map(len, run.kept[1])) == sum(len(plan.survivors[0]) for _, row, _, plan in run.plan if row == 1)
