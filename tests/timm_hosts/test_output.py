"""What comes after the blocks: pooling, heads, features of every depth, compiled models."""

from typing import Any

import pytest
import torch

import fewer
from fewer.types import FewerWarning, UnsupportedModel
from tests.timm_hosts.build import HOSTS, PATCHES, POOLED, Given, host, images, prefix
from tests.timm_hosts.test_reference import some_slots

AVERAGED = [name for name in POOLED if name != "siglip"]


@pytest.mark.parametrize("how", ["copy", "zero", "pinv", "delta", "stale", "kernel"])
@pytest.mark.parametrize("name", ["vit", "eva02", "beit", "naflex"])
def test_restored_output_is_as_long_as_the_host_s(name: str, how: str) -> None:
    model, x = host(name), images(name)
    whole = model.forward_features(x)
    with fewer.compress(model, "tome", keep=0.5, restore=how) as run:
        assert model.forward_features(x).shape == whole.shape
        assert model(x).shape == (2, 5)
    assert run.trace[-1].went == prefix(name) + PATCHES // 2


@pytest.mark.parametrize("name", HOSTS)
def test_restoring_inside_is_restoring_what_came_out(name: str) -> None:
    model, x = host(name), images(name)
    with fewer.compress(model, "tome", keep=0.5, tape=True) as run:
        short = model.forward_features(x)
    with fewer.compress(model, "tome", keep=0.5, restore="copy"):
        full = model.forward_features(x)
    torch.testing.assert_close(full, run.restore(short, "copy"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_features_of_every_depth_keep_their_grid(name: str) -> None:
    """What dense heads read."""
    model, x = host(name), images(name)
    last, whole = model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
    with fewer.compress(model, "tome", keep=0.5, restore="copy") as run:
        final, maps = model.forward_intermediates(x)
        early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(model.forward_features(x), final)
    assert final.shape == last.shape and run.flops < 0.85
    assert [m.shape for m in maps] == [m.shape for m in whole]
    torch.testing.assert_close(early[0], maps[1])
    flat = maps[0].flatten(2).mT
    for row in range(2):
        slot = run.plan[0].assign[row, prefix(name) :]
        assert len(flat[row].unique(dim=0)) == len(slot.unique()) < PATCHES


@pytest.mark.parametrize("how", ["copy", "stale"])
def test_features_of_every_depth_are_what_stopping_there_gives(how: str) -> None:
    """Handing restored features out changes nothing in the blocks that follow."""
    model, x = host("vit"), images("vit")
    slots = some_slots(17, 1, merge=True)
    with fewer.compress(model, Given(slots), keep=0.5, tape=True) as run:
        short = model.forward_features(x)
    with fewer.compress(model, Given(slots), keep=0.5, restore=how) as other:
        full = model.forward_features(x)
    kept = run.kept.unsqueeze(-1).expand_as(short)
    torch.testing.assert_close(full.gather(1, kept), short, atol=1e-6, rtol=1e-6)
    assert run.trace == other.trace


def test_a_host_that_changes_tokens_between_blocks_cannot_be_restored_inside() -> None:
    model, x = host("vit"), images("vit")
    hook = model.blocks[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with fewer.compress(model, "tome", keep=0.5):
        model.forward_features(x)
    refused = pytest.raises(UnsupportedModel, match="between its blocks")
    with refused, fewer.compress(model, "tome", keep=0.5, restore="copy"):
        model.forward_features(x)
    hook.remove()


# --- pooling ---


@pytest.mark.parametrize("name", AVERAGED)
def test_copied_back_an_average_counts_every_original(name: str) -> None:
    model, x, first = host(name), images(name), prefix(name)
    with fewer.compress(model, "tome", keep=0.5) as run:
        short = model.forward_features(x)[:, first:]
    mass = run.mass[:, first:, None]
    want = model.head(model.fc_norm((short * mass).sum(1) / mass.sum(1)))
    with fewer.compress(model, "tome", keep=0.5, restore="copy"):
        got = model(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_copied_back_attention_pooling_counts_every_original() -> None:
    model, x = host("siglip"), images("siglip")
    with fewer.compress(model, "tome", keep=0.5) as run:
        short = model.forward_features(x)
    with fewer.compress(model, "tome", keep=0.5, restore="copy"):
        got = model.forward_head(model.forward_features(x), pre_logits=True)
    row = short[:1].repeat_interleave(run.mass[0].long(), 1)
    torch.testing.assert_close(got[:1], model.forward_head(row, pre_logits=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", POOLED)
def test_pooling_merged_tokens_without_weights_is_said(name: str) -> None:
    model, x = host(name), images(name)
    with fewer.compress(model, "tome", keep=0.5), pytest.warns(FewerWarning, match="restore='copy'"):
        model(x)
    with fewer.compress(model, "random", keep=0.5, restore="copy"), pytest.warns(FewerWarning, match="count as zeros"):
        model(x)
    with fewer.compress(model, "random", keep=0.5):  # these say nothing, as warnings are errors here
        model(x)
    with fewer.compress(model, "tome", keep=0.5, restore="copy"):
        model(x)
    with fewer.compress(model, "tome", keep=1.0):
        model(x)
    model(x)


def test_a_class_token_is_read_without_a_word() -> None:
    for name in ("vit", "deit3", "deit distilled"):
        model = host(name)
        with fewer.compress(model, "tome", keep=0.5) as run:
            model(images(name))
        assert run.flops < 1


# --- torch.compile ---


@pytest.mark.parametrize("name", ["vit", "eva02"])
@pytest.mark.parametrize("how", [{}, {"masses": "channel", "restore": "copy"}], ids=["plain", "channel and copy"])
@torch.no_grad()
def test_a_compiled_model_gives_the_same(name: str, how: dict[str, Any]) -> None:
    model, x = host(name), images(name)
    whole = model.forward_features(x)
    torch.compiler.reset()
    compiled = torch.compile(model.forward_features, backend="aot_eager")
    torch.testing.assert_close(compiled(x), whole, atol=1e-5, rtol=1e-5)
    for method in ("tome", "topk"):
        with fewer.compress(model, method, keep=0.5, **how):
            want = model.forward_features(x)
            for _ in range(2):
                torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(x), whole, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
