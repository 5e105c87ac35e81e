"""Against the plain thing: blocks computed by hand, hosts with dropped keys masked, tokens that are copies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewer
from tests.timm_hosts.build import (
    HOSTS,
    PLAIN,
    RELATIVE,
    ROTARY,
    Given,
    entering,
    host,
    images,
    prefix,
    reduced,
    with_tokens,
)


def projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(b, heads, n, d)` of an attention with one fused projection."""
    b, n, _ = x.shape
    wide = attn.qkv(x)
    if getattr(attn, "q_bias", None) is not None:
        wide = wide + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    q, k, v = wide.reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    return q, k, v


def attended(attn: Any, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention written out, `bias` added to its logits."""
    q, k, v = projected(attn, x)
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))


def scaled(block: Any, part: str, y: Tensor) -> Tensor:
    """What a part gave, times its LayerScale, if the block has one."""
    if hasattr(block, "ls1"):
        gamma = getattr(getattr(block, f"ls{part}"), "gamma", None)
    else:
        gamma = getattr(block, f"gamma_{part}")
    return y if gamma is None else gamma * y


def relative(block: Any) -> Tensor:
    attn = block.attn
    return attn._get_rel_pos_bias() if hasattr(attn, "_get_rel_pos_bias") else attn.rel_pos.get_bias()


def some_slots(n: int, first: int, merge: bool) -> dict[int, Tensor]:
    """At the first block two patches leave or join others, at the second one three, other ones in each row."""

    def at(n: int, gone: list[list[int]]) -> Tensor:
        rows = []
        for out in gone:
            slot, into = [], 0
            for i in range(n):
                leaves = i - first in out
                slot.append((into - 1 if merge else -1) if leaves else into)
                into += not leaves
            rows.append(slot)
        return torch.tensor(rows)

    return {0: at(n, [[3, 4], [1, 9]]), 1: at(n - 2, [[5, 8, 11], [1, 6, 7]])}


@pytest.mark.parametrize("merge", [True, False], ids=["merge", "prune"])
@pytest.mark.parametrize("name", [*PLAIN, *RELATIVE])
def test_blocks_computed_by_hand(name: str, merge: bool) -> None:
    model, x = host(name), images(name)
    tokens, _ = entering(model, x)
    b, n, _ = tokens.shape
    slots = some_slots(n, prefix(name), merge)
    with fewer.compress(model, Given(slots), keep=0.5) as run:
        got = model.forward_features(x)

    mass, place = torch.ones(b, n), torch.arange(n).expand(b, n)
    for layer, block in enumerate(model.blocks):
        bias = mass.log()[:, None, None]
        if name in RELATIVE:
            whole = relative(block)[0]
            bias = bias + torch.stack([whole[:, p][:, :, p] for p in place])
        tokens = tokens + scaled(block, "1", attended(block.attn, block.norm1(tokens), bias))
        if layer in slots:
            slot = slots[layer]
            place = torch.stack(
                [torch.stack([p[s == i][0] for i in range(int(s.max()) + 1)]) for p, s in zip(place, slot, strict=True)]
            )
            tokens, mass = reduced(tokens, slot, mass)
        tokens = tokens + scaled(block, "2", block.mlp(block.norm2(tokens)))
    want = model.norm(tokens)

    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert torch.equal(run.mass, mass)
    assert torch.equal(run.kept, place)


@pytest.mark.parametrize("name", PLAIN)
def test_merging_copies_loses_nothing(name: str) -> None:
    """Tokens that are alike in pairs, merged as pairs: every block gives on one of them what the host gives."""
    model, x, first = host(name), images(name), prefix(name)
    tokens, _ = entering(model, x)
    tokens = torch.cat([tokens[:, :first], tokens[:, first::2].repeat_interleave(2, 1)], 1)
    end = with_tokens(model, tokens)
    whole = model.forward_features(x)
    with fewer.compress(model, "tome", keep=[0.5, 0.5, 0.5]) as run:
        short = model.forward_features(x)
    end()
    assert [one.went for one in run.trace] == [first + 8] * 3
    pairs = torch.arange(8).repeat_interleave(2) + first
    assert run.assign.tolist() == [[*range(first), *pairs.tolist()]] * 2
    assert run.mass[:, first:].unique().tolist() == [2]
    for row in range(2):
        torch.testing.assert_close(short[row], whole[row, run.kept[row]], atol=1e-5, rtol=1e-5)
    with fewer.compress(model, "tome", keep=[0.5, 0.5, 0.5], masses="off"), pytest.raises(AssertionError):
        torch.testing.assert_close(model.forward_features(x)[:, 0], whole[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in HOSTS if name not in (*RELATIVE, "naflex")])
def test_pruning_is_masking_the_dropped_keys(name: str) -> None:
    """The host at full length, each block told to look at nobody who has left by then."""
    model, x = host(name), images(name)
    tokens, named = entering(model, x)
    slots = some_slots(tokens.shape[1], prefix(name), merge=False)
    with fewer.compress(model, Given(slots), keep=0.5) as run:
        short = model.forward_features(x)

    alive, there = torch.ones(tokens.shape[:2], dtype=torch.bool), torch.arange(tokens.shape[1])
    for layer, block in enumerate(model.blocks):
        mask = torch.zeros(alive.shape).masked_fill(~alive, -torch.inf)[:, None, None]
        tokens = block(tokens, **{**of_layer(model, x, named, layer), "attn_mask": mask})
        for row, slot in enumerate(slots.get(layer, [])):
            alive[row, there[alive[row]][slot < 0]] = False
    whole = model.norm(tokens)
    assert torch.equal(alive, run.assign >= 0)
    for row in range(2):
        torch.testing.assert_close(short[row], whole[row, alive[row]], atol=1e-5, rtol=1e-5)


def of_layer(model: Any, x: Tensor, named: dict[str, Any], layer: int) -> dict[str, Any]:
    """What the host passes to a block beside tokens: each has its own table where rotations are learnt."""
    found: list[Any] = []
    hook = model.blocks[layer].register_forward_pre_hook(lambda _, args, kw: found.append(kw), with_kwargs=True)
    model.forward_features(x)
    hook.remove()
    return {key: value for key, value in found[0].items() if key in named}


# --- rotary positions ---


def tables(model: Any, x: Tensor) -> list[Tensor]:
    """The rotary table that each block's attention gets."""
    seen: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, args, named: seen.append(named["rope"]), with_kwargs=True)
        for block in model.blocks
    ]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ROTARY)
def test_pruned_tokens_take_their_rotations_with_them(name: str) -> None:
    """The host's own blocks, on tokens and tables that were gathered by hand."""
    model, x, first = host(name), images(name), prefix(name)
    whole = tables(model, x)
    tokens, _ = entering(model, x)
    slots = some_slots(tokens.shape[1], first, merge=False)
    with fewer.compress(model, Given(slots), keep=0.5) as run:
        got = model.forward_features(x)

    for row in range(2):
        own, left = tokens[row : row + 1], torch.arange(tokens.shape[1])
        for layer, block in enumerate(model.blocks):
            rope = whole[layer][..., left[first:] - first, :]
            own = own + scaled(block, "1", block.attn(block.norm1(own), rope=rope))
            if layer in slots:
                stays = slots[layer][row] >= 0
                own, left = own[:, stays], left[stays]
            own = own + scaled(block, "2", block.mlp(block.norm2(own)))
        torch.testing.assert_close(got[row], model.norm(own)[0], atol=1e-5, rtol=1e-5)
        assert run.kept[row].tolist() == left.tolist()


@pytest.mark.parametrize("name", ROTARY)
def test_merged_tokens_are_where_their_survivor_is(name: str) -> None:
    model, x, first = host(name), images(name), prefix(name)
    whole = tables(model, x)
    with fewer.compress(model, "tome", keep=[0.5, 0.5, 0.5]) as run:
        got = tables(model, x)
    assert torch.equal(got[0], whole[0])
    for layer in (1, 2):
        for row in range(2):
            want = whole[layer][..., run.kept[row, first:] - first, :]
            assert torch.equal(got[layer][row], want if want.ndim == 3 else want[None])


@pytest.mark.parametrize("name", ROTARY)
def test_merged_tokens_are_half_way(name: str) -> None:
    """Two neighbours of mass one, which are less than half a turn apart; and a third of the way where masses differ."""
    model, x, first = host(name), images(name), prefix(name)
    n = first + 16
    pairs = torch.arange(n).expand(2, n).clone()
    pairs[:, first:] = first + torch.arange(16) // 2
    with fewer.compress(model, Given({0: pairs}), keep=0.5, positions="centroid"):
        got = tables(model, x)[1]
    whole = tables(model, x)[1]
    sin, cos = (part if part.ndim == 3 else part[None] for part in whole.chunk(2, -1))
    angle = torch.atan2(sin, cos)
    left, right = angle[:, ::2], angle[:, 1::2]
    apart = torch.remainder(right - left + torch.pi, 2 * torch.pi) - torch.pi  # the shorter way round
    middle = left + apart / 2
    clear = (torch.pi - apart.abs()) > 0.1
    for row in got:
        torch.testing.assert_close(row.chunk(2, -1)[0][clear], middle.sin()[clear], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row.chunk(2, -1)[1][clear], middle.cos()[clear], atol=1e-4, rtol=1e-4)
    assert clear.float().mean() > 0.5


@pytest.mark.parametrize("name", ROTARY)
def test_where_positions_do_not_differ_both_ways_are_one(name: str) -> None:
    model, x = host(name), images(name)
    found = []
    for positions in ("survivor", "centroid"):
        with fewer.compress(model, "random", keep=0.5, positions=positions):
            found.append(model.forward_features(x))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


# --- readouts ---


def test_the_class_token_counts_what_was_merged() -> None:
    """A merged token of mass m is in the class token's softmax m times, to the letter."""
    model, x = host("vit", depth=2), images("vit")
    tokens, _ = entering(model, x)
    pairs = torch.cat([torch.zeros(1), 1 + torch.arange(16) // 2]).long().expand(2, 17)
    with fewer.compress(model, Given({0: pairs}), keep=0.5):
        got = model.forward_features(x)
    one, two = model.blocks
    mixed = tokens + scaled(one, "1", one.attn(one.norm1(tokens)))
    merged, _ = reduced(mixed, pairs, torch.ones(2, 17))
    merged = merged + scaled(one, "2", one.mlp(one.norm2(merged)))
    twice = merged.repeat_interleave(torch.tensor([1] + [2] * 8), 1)
    want = model.norm(two(twice))
    torch.testing.assert_close(got[:, 0], want[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 1:], want[:, 1::2], atol=1e-5, rtol=1e-5)


def test_padding_masks_of_hosts_reach_the_same() -> None:
    """A mask over keys, as the host takes it, is the shorter picture."""
    model = host("vit")
    tokens, _ = entering(model, images("vit"))
    mask = torch.zeros(2, 1, 17, 17)
    mask[..., 11:] = -torch.inf
    outs = []
    for cut, given in ((17, {"attn_mask": mask}), (11, {})):
        blocks = torch.nn.ModuleList(model.blocks)
        with fewer.compress(blocks, "topk", keep=0.5) as run:
            run.prefix = 1
            out = tokens[:, :cut]
            for block in blocks:
                out = block(out, **given)
        outs.append(F.layer_norm(out, out.shape[-1:])[:, : int((run.mass > 0).sum(-1)[0])])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
