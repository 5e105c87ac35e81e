"""Encoders of transformers whose head pools every token: merged ones must not count once in silence."""

import pytest
import torch
from torch import Tensor, nn

import fewer
from fewer.types import FewerWarning


def siglip() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16
    )
    return SiglipVisionModel(config).eval().requires_grad_(False)


def pooled(model: nn.Module) -> Tensor:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found: Tensor = model(x).pooler_output
    return found


def test_merged_tokens_that_are_pooled_without_weights_are_said() -> None:
    model = siglip()
    with fewer.compress(model, "tome", keep=0.5), pytest.warns(FewerWarning, match="restore='copy'"):
        pooled(model)
    with fewer.compress(model, "topk", keep=0.5, restore="copy"), pytest.warns(FewerWarning, match="count as zeros"):
        pooled(model)
    with fewer.compress(model, "topk", keep=0.5):  # says nothing, as warnings are errors here
        pooled(model)


def test_copied_back_every_original_counts_once() -> None:
    model = siglip()
    inner = getattr(model, "vision_model", model)
    with fewer.compress(model, "tome", keep=0.5, restore="copy") as run:
        got = pooled(model)
    with fewer.compress(model, "tome", keep=0.5), pytest.warns(FewerWarning):
        short = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))).last_hidden_state
    for row in range(2):
        copies = short[row : row + 1].repeat_interleave(run.mass[row].long(), 1)
        torch.testing.assert_close(got[row : row + 1], inner.head(copies), atol=1e-5, rtol=1e-5)


def test_hidden_states_of_every_depth_have_the_full_length() -> None:
    model = siglip()
    x = torch.randn(1, 3, 64, 64)
    with fewer.compress(model, "tome", keep=0.5, restore="copy"):
        out = model(x, output_hidden_states=True)
    assert {state.shape for state in out.hidden_states} == {(1, 16, 32)}
