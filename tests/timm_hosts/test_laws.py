"""What holds on every kind of host: bit for bit when nothing leaves or the context does, and prefix tokens are safe."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fewer
from fewer.types import FewerError, UnsupportedModel
from tests.adapters.common import assert_same_state, state
from tests.timm_hosts.build import HOSTS, PATCHES, PREFIX, RELATIVE, host, images, prefix, timm

METHODS = ("random", "topk", "tome")


class Oops(RuntimeError):
    """Raised on purpose."""


def fail(*_: Any) -> None:
    raise Oops


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_keeping_all_changes_no_bit(name: str, method: str) -> None:
    model, x = host(name), images(name)
    whole = model.forward_features(x)
    with fewer.compress(model, method, keep=1.0) as run:
        assert torch.equal(model.forward_features(x), whole)
    assert run.flops == 1 and all(plan is None for plan in run.plan)


@pytest.mark.parametrize("name", HOSTS)
def test_leaving_restores_everything(name: str) -> None:
    model, x = host(name), images(name)
    before, whole = state(model), model.forward_features(x)
    for how in ({}, {"masses": "channel"}, {"restore": "copy"}):
        with fewer.compress(model, "tome", keep=0.5, **how):
            model.forward_features(x)
    with pytest.raises(Oops), fewer.compress(model, "tome", keep=0.5):
        fail()
    hook = model.blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(Oops), fewer.compress(model, "tome", keep=0.5):
        model.forward_features(x)
    hook.remove()
    assert_same_state(before, state(model))
    assert not any("forward" in vars(block) for block in model.blocks)
    assert torch.equal(model.forward_features(x), whole)


@pytest.mark.parametrize("name", HOSTS)
def test_a_forward_that_failed_leaves_the_next_one_alone(name: str) -> None:
    model, x = host(name), images(name)
    with fewer.compress(model, "tome", keep=0.5) as run:
        want = model.forward_features(x)
        hook = model.blocks[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Oops):
            model.forward_features(x)
        hook.remove()
        assert torch.equal(model.forward_features(x), want)
    assert len(run.plan) == 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_as_many_stay_as_asked_and_prefix_tokens_are_alone(name: str, method: str) -> None:
    model, first = host(name), prefix(name)
    with fewer.compress(model, method, keep=0.5) as run:
        out = model.forward_features(images(name))
    assert run.prefix == first
    assert out.shape[1] == run.mass.shape[1] == first + PATCHES // 2
    assert [one.came for one in run.trace[1:]] == [one.went for one in run.trace[:-1]]
    for row in range(2):
        assert run.kept[row, :first].tolist() == run.assign[row, :first].tolist() == list(range(first))
        assert bool((run.assign[row, first:] != torch.arange(first).unsqueeze(1)).all()), "nobody joins them"
    assert bool((run.mass[:, :first] == 1).all())
    if method == "tome":
        assert run.mass.sum(-1).tolist() == [first + PATCHES] * 2


@pytest.mark.parametrize("name", HOSTS)
def test_masses_by_mask_and_by_channel_are_the_same(name: str) -> None:
    model, x = host(name), images(name)
    found = {}
    for form in ("mask", "channel", "off"):
        with fewer.compress(model, "tome", keep=[0.5, 0.5, 0.5], masses=form) as run:
            found[form] = model.forward_features(x)
        found[form, "plan"] = run.assign
    assert torch.equal(found["mask", "plan"], found["off", "plan"]), "the first block attends before anything merges"
    torch.testing.assert_close(found["mask"], found["channel"], atol=1e-5, rtol=1e-5)
    assert (found["mask"] - found["off"])[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HOSTS)
def test_a_row_is_shortened_the_same_alone_and_in_a_batch(name: str, method: str) -> None:
    model, x = host(name), images(name, rows=3)
    with fewer.compress(model, method, keep=0.5):
        together = model.forward_features(x)
        for row in range(3):
            torch.testing.assert_close(model.forward_features(x[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", HOSTS)
def test_in_bfloat16(name: str) -> None:
    model, x = host(name).bfloat16(), images(name).bfloat16()
    for form in ("mask", "channel"):
        with fewer.compress(model, "tome", keep=0.5, masses=form) as run:
            out = model.forward_features(x)
        assert out.dtype is torch.bfloat16 and bool(out.isfinite().all())
        assert run.mass.sum(-1).tolist() == [prefix(name) + PATCHES] * 2


@pytest.mark.parametrize("name", HOSTS)
def test_under_autocast(name: str) -> None:
    model, x = host(name), images(name)
    with torch.autocast("cpu", torch.bfloat16), fewer.compress(model, "tome", keep=0.5, positions="centroid"):
        assert bool(model.forward_features(x).isfinite().all())


@pytest.mark.parametrize("name", HOSTS)
def test_gradients_flow(name: str) -> None:
    model, x = host(name).requires_grad_(True), images(name)
    with fewer.compress(model, "tome", keep=0.5):
        model.forward_features(x).square().sum().backward()
    assert all(block.mlp.fc2.weight.grad is not None for block in model.blocks)


def test_gradient_checkpointing_is_refused_clearly() -> None:
    model = host("vit").requires_grad_(True)
    model.set_grad_checkpointing(True)
    with fewer.compress(model, "tome", keep=0.5), pytest.raises(UnsupportedModel, match="checkpoints its gradients"):
        model.forward_features(images("vit")).sum().backward()


# --- the front door ---


def test_a_context_inside_another_is_refused() -> None:
    model, x = host("vit"), images("vit")
    with fewer.compress(model, "tome", keep=0.5):
        want = model(x)
        with pytest.raises(FewerError, match="inside a compress"), fewer.compress(model, "topk", keep=0.5):
            pass
        assert torch.equal(model(x), want)


def test_unknown_hosts_are_told_the_known_ones() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(UnsupportedModel, match="timm's VisionTransformer, EVA or BEiT"):
        fewer.compress(model, "tome", keep=0.5).__enter__()


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        ("hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}, "does not take"),
        ("samvit_base_patch16_224", {"embed_dim": 32, "num_heads": 2, "depth": 2}, "does not take"),
        ("pit_ti_224", {}, "several stages"),
    ],
)
def test_hosts_of_windows_and_stages_are_refused(model: str, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        fewer.compress(timm.create_model(model, **how), "tome", keep=0.5).__enter__()


def test_a_host_whose_attention_is_not_fused_says_what_to_do() -> None:
    timm.layers.set_fused_attn(False)
    try:
        model = host("vit")
    finally:
        timm.layers.set_fused_attn(True)
    before = state(model)
    with pytest.raises(UnsupportedModel, match="set_fused_attn"), fewer.compress(model, "tome", keep=0.5):
        model(images("vit"))
    assert_same_state(before, state(model))


def test_causal_attention_is_refused() -> None:
    model = host("vit")
    with pytest.raises(UnsupportedModel, match="causally"), fewer.compress(model, "tome", keep=0.5):
        model.forward_features(images("vit"), is_causal=True)


@pytest.mark.parametrize("fill", ["a row of its own for each query", "numbers"])
def test_masks_that_are_more_than_padding_are_refused(fill: str) -> None:
    model = host("vit")
    mask = torch.zeros(1, 1, 17, 17)
    mask = mask.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf) if fill != "numbers" else mask + 0.5
    refused = pytest.raises(UnsupportedModel, match="more than which tokens are padding")
    with refused, fewer.compress(model, "tome", keep=0.5):
        model.forward_features(images("vit"), attn_mask=mask)


def test_a_wrapped_host_keeps_its_prefix() -> None:
    model = host("naflex")
    with fewer.compress(torch.nn.Sequential(model), "random", keep=0.5) as run:
        model.forward_features(images("naflex"))
    assert run.prefix == PREFIX["naflex"]


# --- sizes ---


def test_images_of_several_sizes() -> None:
    model = host("vit", dynamic_img_size=True)
    with fewer.compress(model, "tome", keep=0.5) as run:
        for height, width in ((64, 64), (96, 64), (128, 128)):
            out = model.forward_features(torch.randn(1, 3, height, width))
            patches = height * width // 256
            assert out.shape[1] == 1 + patches // 2
            assert run.state.grid == (height // 16, width // 16)


def naflex_batch(sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Pictures of these grids, as patches, padded to the longest."""
    longest = max(h * w for h, w in sizes)
    draw = torch.Generator().manual_seed(3)
    batch = {
        "patches": torch.zeros(len(sizes), longest, 768),
        "patch_coord": torch.zeros(len(sizes), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(sizes), longest, dtype=torch.bool),
    }
    for row, (h, w) in enumerate(sizes):
        n = h * w
        batch["patches"][row, :n] = torch.randn(n, 768, generator=draw)
        batch["patch_coord"][row, :n] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        batch["patch_valid"][row, :n] = True
    return batch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rope", ["none", "axial"])
def test_pictures_of_several_sizes_in_one_batch(method: str, rope: str) -> None:
    model = host("naflex", rope_type=rope)
    batch = naflex_batch([(4, 4), (2, 4)])
    whole = model.forward_features(**batch)
    with fewer.compress(model, method, keep=1.0):
        assert torch.equal(model.forward_features(**batch)["patches"], whole["patches"])
    with fewer.compress(model, method, keep=0.5) as run:
        together = model.forward_features(**batch)["patches"]
        assert (run.mass > 0).sum(-1).tolist() == [4 + 8, 4 + 4]
        assert bool((run.assign[1, 4 + 8 :] == -1).all())
        alone = model.forward_features(**naflex_of(batch, 1, 8))["patches"]
    torch.testing.assert_close(together[1, :8], alone[0], atol=1e-5, rtol=1e-4)
    with fewer.compress(model, method, keep=0.5, restore="copy"):
        assert model.forward_features(**batch)["patches"].shape == whole["patches"].shape


def naflex_of(batch: dict[str, Tensor], row: int, patches: int) -> dict[str, Tensor]:
    return {name: value[row : row + 1, :patches] for name, value in batch.items()}


# --- budgets ---


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_the_flops(method: str) -> None:
    model, x = host("vit", img_size=160), torch.randn(2, 3, 160, 160)
    with fewer.compress(model, method, keep="0.6 flops") as run:
        model.forward_features(x)
    assert 0.57 < run.flops <= 0.6


@pytest.mark.parametrize("name", [name for name in HOSTS if name not in RELATIVE])
def test_flops_as_torch_counts_them(name: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def count() -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.forward_features(x)
        return int(counter.get_total_flops())

    model, x = host(name), images(name)
    whole = count()
    with fewer.compress(model, "random", keep=0.5) as run:
        short = count()
    tokens = prefix(name) + PATCHES
    blocks = 2 * 3 * run.cost.block_flops(tokens, tokens)
    assert short == pytest.approx(whole - blocks * (1 - run.flops), rel=0.01)
