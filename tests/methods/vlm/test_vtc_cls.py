"""VTC-CLS: the class token's attention in several layers of the tower."""

import copy

import pytest
import torch

import fewer
from fewer.errors import FewerError, MissingSignal
from fewer.methods.vlm.vtc_cls import VTCCLS
from fewer.signals.visual import TowerView
from tests.methods.vlm.build import decide, kept, place, view
from tests.vlms import FAMILIES


def test_worked_example() -> None:
    """Two heads give four tokens 0.4, 0.1, 0.2, 0.3 and 0.0, 0.5, 0.1, 0.4: on average 0.2, 0.3, 0.15, 0.35."""
    tokens = place(4, tower=[[0.4, 0.1, 0.2, 0.3], [0.0, 0.5, 0.1, 0.4]])
    assert kept(decide(VTCCLS(), tokens, 2)) == [1, 3]
    assert kept(decide(VTCCLS(), tokens, 3)) == [0, 1, 3]


@pytest.mark.parametrize("keep", [1, 7, 19])
def test_agrees_with_plain_python(keep: int) -> None:
    tokens = place(20, tower=True)
    heads = view(20).attention.tolist()
    sums = [sum(head[i] for head in heads) for i in range(20)]
    assert kept(decide(VTCCLS(), tokens, keep)) == sorted(sorted(range(20), key=lambda i: -sums[i])[:keep])


def test_ties_leave_as_many() -> None:
    assert kept(decide(VTCCLS(), place(9, tower=[0.1] * 9), 4)) == [5, 6, 7, 8]


def test_the_mean_over_layers_has_the_keys_of_the_last() -> None:
    first, last = view(6, seed=1), view(6, seed=2)
    mean = TowerView.mean([first, last])
    assert mean.attention.allclose((first.attention + last.attention) / 2)
    assert mean.keys.equal(last.keys)
    assert TowerView.mean([first]) is first


AUTHORS = {
    0.0: [1, 4, 5, 6, 9, 11, 15, 16, 17, 18, 20, 27, 30, 35],
    0.5: [1, 6, 10, 11, 15, 16, 17, 18, 20, 26, 27, 30, 31, 35],
}
"""Made with the sums of the authors' `cls_token_only` (VTC-CLS, llava/model/multimodal_encoder/clip_encoder.py,
e41ac9b) over the attention maps that a tower of 3 layers hands out itself, from layers 0 and 1 on."""
WEIGHTS = 1276.32899
"""What the absolute weights of the tower add up to, with which these were made."""


@pytest.mark.parametrize("since", AUTHORS)
@torch.no_grad()
def test_chooses_by_the_sums_of_the_towers_own_maps(since: float) -> None:
    case = FAMILIES["llava"]()
    inputs, tower = case.inputs([1]), copy.deepcopy(case.model.model.vision_tower)
    with fewer.compress(case.model, VTCCLS(since), keep=14) as run:
        case.model(**inputs)
    tower.set_attn_implementation("eager")
    maps = tower(inputs["pixel_values"], output_attentions=True).attentions
    sums = sum(one[0, :, 0, 1:].sum(0) for one in maps[int(2 * since) : 2])
    assert run.kept[0][0].tolist() == sums.topk(14).indices.sort().values.tolist()


@pytest.mark.parametrize("since", AUTHORS)
@torch.no_grad()
def test_chooses_as_the_authors_do(since: float) -> None:
    case = FAMILIES["llava"]()
    drawn = sum(float(one.double().abs().sum()) for one in case.model.model.vision_tower.parameters())
    if abs(drawn - WEIGHTS) > 1e-3:
        pytest.skip("this transformers draws other weights than those that the authors' choice was made with")
    with fewer.compress(case.model, VTCCLS(since), keep=14) as run:
        case.model(**case.inputs([1]))
    assert run.kept[0][0].tolist() == AUTHORS[since]


def test_features_of_an_earlier_layer() -> None:
    case = FAMILIES["llava"]()
    with pytest.raises(MissingSignal, match=r"since=0\.9"), fewer.compress(case.model, VTCCLS(0.9), keep=14):
        pass


def test_a_tower_without_a_class_token() -> None:
    case = FAMILIES["qwen2_vl"]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, VTCCLS(by="received"), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3


@pytest.mark.parametrize("since", [-0.1, 1.0, float("nan")])
def test_shares_are_shares(since: float) -> None:
    with pytest.raises(FewerError, match="from 0 to below 1"):
        VTCCLS(since)
