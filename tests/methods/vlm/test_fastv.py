"""FastV: what the prompt's last token looks at goes on."""

import pytest
import torch

import fewer
from fewer.errors import FewerError, MissingSignal
from fewer.methods.vlm.fastv import FastV
from tests.methods.vlm.build import decide, kept, place
from tests.methods.vlm.look import asked, attention, look
from tests.vlms import FAMILIES


def test_worked_example() -> None:
    """Two words come after four tokens. The first looks at 0; only the last one counts, which looks at 2, then at 1."""
    tokens = place(4, looked=asked([[9.0, 0, 0, 0], [0, 1, 2, 0.5]]))
    torch.testing.assert_close(
        FastV().score(tokens)[0], torch.tensor([0, 1, 2, 0.5, 0, 0]).softmax(0)[:4], atol=1e-6, rtol=1e-5
    )
    assert kept(decide(FastV(), tokens, 1)) == [2]
    assert kept(decide(FastV(), tokens, 3)) == [1, 2, 3]


@pytest.mark.parametrize("keep", [1, 6, 19])
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_plain_python(keep: int, seed: int) -> None:
    """The mean over heads of the last row of the whole map, positions and all."""
    looked = look(20, seed=seed)
    last = [head[-1] for head in attention(looked)]
    scores = [sum(head[3 + i] for head in last) / len(last) for i in range(20)]
    tokens = place(20, looked=looked)
    torch.testing.assert_close(FastV().score(tokens)[0], torch.tensor(scores), atol=1e-6, rtol=1e-4)
    assert kept(decide(FastV(), tokens, keep)) == sorted(sorted(range(20), key=lambda i: -scores[i])[:keep])


def test_ties_leave_as_many() -> None:
    tokens = place(6, looked=asked([[1.0] * 6]))
    assert kept(decide(FastV(), tokens, 4)) == [2, 3, 4, 5]


@torch.no_grad()
def test_chooses_what_eager_attention_says() -> None:
    """The authors' rule written out (FastV, modeling_llama.py, d165972): the mean over heads of the map of layer K - 1,
    its last row, the columns of the picture, the greatest of these; on the maps that the model hands out itself."""
    case = FAMILIES["llava"]()
    inputs = case.inputs([1])
    case.model.set_attn_implementation("eager")
    maps = case.model(**inputs, output_attentions=True).attentions
    columns = (inputs["input_ids"][0] == case.model.config.image_token_id).nonzero().flatten()
    for layer in (1, 2, 4):
        row = maps[layer - 1].mean(dim=1)[0, -1, columns]
        expected = row.topk(15).indices.sort().values
        with fewer.compress(case.model, FastV(layer), keep=15) as run:
            case.model(**inputs)
        assert run.kept[0][0].tolist() == expected.tolist()
        assert [after for after, *_ in run.plan] == [layer - 1]


def test_where_it_may_cut() -> None:
    with pytest.raises(FewerError, match="at least 1"):
        FastV(0)
    case = FAMILIES["llava"]()
    with pytest.raises(FewerError), fewer.compress(case.model, FastV(5), keep=15):
        case.model(**case.inputs([1]))
    assert FastV(3).after(32) == (2,)


def test_without_attention() -> None:
    with pytest.raises(MissingSignal, match="TextAttention"):
        decide(FastV(), place(5), 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_a_model(name: str) -> None:
    case = FAMILIES[name]()
    inputs = case.inputs([1, 2])
    with fewer.compress(case.model, FastV(), keep=0.4) as run:
        case.model(**inputs)
    assert len(run.plan) == 3
