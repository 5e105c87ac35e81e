"""The output projection of every family: found, cut into heads as the model uses it, or refused by name."""

import pytest
import torch

import fewer
from fewer.adapters.hf_bind import OUTPUTS, Host
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.criticalkv import CriticalKV
from fewer.methods.kv.snapkv import SnapKV
from fewer.types import MissingSignal
from tests.adapters.common import FAMILIES, refused, untouched
from tests.adapters.test_hosts import gpt2
from tests.tiny import prompt, tiny

CRITICAL = CriticalKV(SnapKV(window=8))


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_times_their_matrices_are_the_models_own_output(family: str) -> None:
    """sum over heads of x_h W_h is what the layer's module makes of all heads side by side, but for its bias."""
    host = Host.of(tiny(family))
    for index, attention in enumerate(host.attentions):
        weight = host.output(index)
        assert weight is not None and weight.shape == (4, 16, 64)
        (module,) = [m for name, m in attention.named_children() if name in OUTPUTS]
        x = torch.randn(2, 5, 4, 16)  # (b, q, heads, e), as every model lays its heads side by side
        ours = torch.einsum("bqhe,heo->bqo", x, weight)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(ours, module(x.flatten(2)) - bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_module_writes_through_it(family: str) -> None:
    """What the module takes in and gives out when the whole model runs is the same product: no head is out of place."""
    model, seen = tiny(family), {}
    host = Host.of(model)
    (module,) = [m for name, m in host.attentions[1].named_children() if name in OUTPUTS]
    handle = module.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    model(prompt(9))
    handle.remove()
    weight = host.output(1)
    assert weight is not None
    ours = torch.einsum("bqhe,heo->bqo", seen["x"].unflatten(-1, (4, 16)), weight)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(ours, seen["out"] - bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_reaches_the_method(family: str) -> None:
    model = tiny(family)
    with untouched(model, prompt(30)), fewer.compress(model, CRITICAL, keep=0.5) as run:
        model.generate(prompt(40), max_new_tokens=3, do_sample=False)
        assert all(set(layer.kept[0]) == {20 + 2} for layer in run.report.layers if layer.state == "compressed")
        assert any(layer.state == "compressed" for layer in run.report.layers)


def test_around_adakv_heads_are_uneven_and_padding_is_nothing() -> None:
    """A padded batch keeps for each row what the row keeps alone."""
    model, method = tiny("llama"), CriticalKV(AdaKV(SnapKV(window=8)))
    ids, mask = torch.cat([prompt(40), prompt(40, seed=1)]), torch.ones(2, 40, dtype=torch.long)
    ids[1, :15], mask[1, :15] = 0, 0
    with fewer.Cache(model, method, 0.5) as both, fewer.Cache(model, method, 0.5) as alone:
        model(ids, attention_mask=mask, past_key_values=both)
        model(ids[1:, 15:], past_key_values=alone)
        for one, other in zip(both.report.layers, alone.report.layers, strict=True):
            assert one.kept[1] == other.kept[0] and sum(one.kept[1]) == 2 * 13


def test_a_projection_that_is_not_found_is_refused() -> None:
    """GPT-2's is no linear layer."""
    assert Host.of(gpt2()).output(0) is None
    refused(gpt2(), MissingSignal, "CriticalKV needs the output projection.*GPT2Attention", CRITICAL)
