"""The reference for real removal: a plain transformers cache that keeps everything, seen through a mask.

    Twin       one model twice, step by step: with a fewer cache, and with a DynamicCache under `masked` attention
    masked     float32 attention that hides, for each layer, row and KV head, the entries that the fewer cache dropped

Nothing here uses fewer's attention, rotation or masks; what was kept is read from the cache's positions alone.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import fewer
from tests.tiny import tiny

MASKED = "masked_reference"
CLOSE = 1e-4


@dataclass(frozen=True)
class View:
    """What one layer may see of its first n columns, and by how much its keys are turned on."""

    keep: Tensor  # (b, h, n) bool
    shift: Tensor | None = None  # (b, h, n)


_views: WeakKeyDictionary[nn.Module, View] = WeakKeyDictionary()
_weights: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as in the textbook, with the layer's view laid over the host's own mask."""
    view, groups = _views.get(module), query.shape[1] // key.shape[1]
    if view is not None and view.shift is not None:
        n = view.shift.shape[-1]
        key = torch.cat([turned(module, key[:, :, :n], view.shift), key[:, :, n:]], dim=2)
    key, value = (part.float().repeat_interleave(groups, dim=1) for part in (key, value))
    logits = query.float() @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits + attention_mask
    if view is not None:
        n = view.keep.shape[-1]
        hidden = ~view.keep.repeat_interleave(groups, dim=1).unsqueeze(2)
        logits[..., :n] = logits[..., :n].masked_fill(hidden, torch.finfo(logits.dtype).min)
    weights = _weights[module] = logits.softmax(-1)
    out = weights @ value
    return out.transpose(1, 2).contiguous().to(query.dtype), None


AttentionInterface.register(MASKED, masked)
AttentionMaskInterface.register(MASKED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def turned(module: nn.Module, key: Tensor, by: Tensor) -> Tensor:
    """Keys `(b, h, n, d)` rotated on by `(b, h, n)` positions, half-split as every tiny family has it."""
    rope = module.config.rope_parameters
    rope = rope.get("full_attention", rope)
    width = int(key.shape[-1] * rope.get("partial_rotary_factor", 1.0))
    frequency = rope["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    angle = (by.unsqueeze(-1) * frequency).repeat(1, 1, 1, 2)  # (b, h, n, width)
    x = key[..., :width]
    swapped = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    return torch.cat([x * angle.cos() + swapped * angle.sin(), key[..., width:]], dim=-1)


def kept_positions(cache: Any, layer: int) -> list[list[list[int]]]:
    """Positions that were packed, for each row and head."""
    kept = cache.layers[layer].kept
    return [[kept.positions[start:end].tolist() for start, end in row] for row in kept.bounds]


def ours(cache: Any) -> list[int]:
    """Indices of the layers that fewer compresses."""
    return [index for index, layer in enumerate(cache.layers) if not layer.is_sliding]


def columns(attention_mask: Tensor) -> Tensor:
    """Position of each column among its row's real tokens, -1 for padding: `(b, n)`."""
    real = attention_mask.bool()
    return torch.where(real, real.cumsum(-1) - 1, -1)


def view_of(layer: Any, heads: int, places: Tensor, sinks: int | None = None) -> View:
    """The columns at `places` `(b, n)` that a fewer layer still holds.

    With `sinks`, the first `sinks` packed entries of a head are turned on until they touch the others, which is what
    counting positions inside the cache comes to.
    """
    b, n = places.shape
    keep = torch.ones(b, heads, n, dtype=torch.bool)
    shift = torch.zeros(b, heads, n, dtype=torch.long)
    before = n - layer.keys.shape[2]  # everything after was not compressed yet
    if layer.kept is not None:
        for row, spans in enumerate(layer.kept.bounds):
            for head, (start, end) in enumerate(spans):
                held = layer.kept.positions[start:end].tolist()
                keep[row, head, :before] = torch.isin(places[row, :before], torch.tensor(held, dtype=torch.long))
                if sinks is not None and (sunk := [p for p in held if p < sinks]):
                    ends = int(places[row, :before].max()) + 1 if len(held) == len(sunk) else held[len(sunk)]
                    shift[row, head] = (places[row] < sinks) * (ends - 1 - sunk[-1])
    return View(keep, None if sinks is None else shift)


class Twin:
    """A tiny model with a fewer cache, and the same model with a plain cache that sees only what the first one kept."""

    def __init__(
        self,
        family: str,
        method: Any,
        keep: Any,
        *,
        sinks: int | None = None,
        dtype: torch.dtype = torch.float32,
        when: Any = "prefill",
        every: int = 64,
        **changes: Any,
    ) -> None:
        self.model, self.plain = (tiny(family, dtype=dtype, attn=attn, **changes) for attn in ("sdpa", MASKED))
        self.cache = fewer.Cache(self.model, method, keep, when=when, every=every)
        self.full = DynamicCache(config=self.plain.config)
        self.sinks = sinks
        self.seen: Tensor | None = None  # the attention mask so far
        self.weights: dict[int, Tensor] = {}  # what each layer of the emulation attended to in the last step

    def views(self) -> dict[int, View]:
        """What each layer of ours holds now."""
        heads = getattr(self.plain.config, "num_key_value_heads", None) or self.plain.config.num_attention_heads
        assert self.seen is not None
        places = columns(self.seen)
        return {i: view_of(self.cache.layers[i], heads, places, self.sinks) for i in ours(self.cache)}

    def step(
        self, ids: Tensor, real: Tensor | None = None, views: dict[int, View] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One forward of both; `real` `(b, n)` marks the new tokens that are no padding. Logits at those only."""
        new = torch.ones_like(ids) if real is None else real.long()
        before = views if views is not None else self.views() if self.seen is not None else {}
        mask = new if self.seen is None else torch.cat([self.seen, new], dim=1)
        call = {"attention_mask": mask, "position_ids": columns(mask)[:, -ids.shape[1] :].clamp(min=0)}
        with torch.no_grad():
            got = self.model(ids, past_key_values=self.cache, **call).logits
            for module in attentions(self.plain):
                if module.layer_idx in before:
                    _views[module] = before[module.layer_idx]
            want = self.plain(ids, past_key_values=self.full, **call).logits
        self.weights = {m.layer_idx: _weights[m] for m in attentions(self.plain) if m in _weights}
        _views.clear()
        self.seen = mask
        return got[new.bool()], want[new.bool()]


def attentions(model: PreTrainedModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest number that was to come out."""
    assert got.shape == want.shape and bool(torch.isfinite(got).all())
    return float((got - want).abs().max() / want.abs().max())


def assert_close(got: Tensor, want: Tensor, within: float = CLOSE) -> None:
    off = difference(got.float(), want.float())
    assert off <= within, f"off by {off:.2e} of the scale, allowed {within:.0e}"
