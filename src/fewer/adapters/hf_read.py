"""Decoding steps that read part of a cache which holds everything: the keys that an earlier layer chose.

A method asks for it by `reads(layer)`: "all", "choose" (all, and the `top_k` columns with the highest logits are the
choice of each query head) or "chosen". Forwards of several tokens read everything. Visual tokens that a cache keeps and
does not read are the matter of `vlm_read`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewer.adapters import vlm_read
from fewer.types import FewerError, UnsupportedModel

if TYPE_CHECKING:
    from fewer.adapters.hf_layer import Layer


def check(method: Any, layers: int) -> None:
    """Raise if no layer, of so many, is to read less than all."""
    if "chosen" not in map(method.reads, range(layers)):
        raise FewerError(
            f"{method}: this model has {layers} layers with an unbounded cache, and each would read everything; have "
            f"an earlier one choose, such as start=0"
        )


def read(
    layer: "Layer",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor | None:
    """A decoding step's attention `(b, 1, heads, e)` to what the method lets this layer read; None where it is to read
    everything in the host's own way."""
    shared = layer.shared
    method: Any = shared.policy.method
    (b, heads, q, d), (h, n) = query.shape, key.shape[1:3]
    if getattr(method, "reads", None) is None:
        return vlm_read.read(layer, query, key, value, mask, scaling, softcap)
    if q > 1 or layer.length == 0:
        return None
    if layer.parts:
        raise UnsupportedModel(
            f"layer {layer.index} holds packed tokens, and {type(method).__name__} has layers read what others chose: "
            f"use it without a store, on a cache that was not compressed"
        )
    role, k = method.reads(layer.place), min(method.top_k, n)
    real = [count + 1 for count in layer.real]  # this step's token is not in the books yet
    seen = [min(count, k) for count in real] if role == "chosen" else real
    layer.reads = layer.reads[0] + sum(seen), layer.reads[1] + sum(real)
    if role == "all" or k == n:
        return None
    grouped = query.view(b, h, heads // h, d) * scaling  # query heads of a group share a key head
    if role == "choose":
        logits = _seen(grouped @ key.transpose(-1, -2), mask, softcap)
        shared.chosen = logits.topk(k, dim=-1).indices  # (b, h, g, k)
        out = _weights(logits, value) @ value
    else:
        at = shared.chosen
        assert at is not None, "a layer that chooses comes first"
        logits = _seen((grouped.unsqueeze(3) @ _gathered(key, at).transpose(-1, -2)).squeeze(3), mask, softcap, at)
        out = (_weights(logits, value).unsqueeze(3) @ _gathered(value, at)).squeeze(3)
    return out.reshape(b, 1, heads, value.shape[-1])


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """The columns of `(b, h, n, d)` that each query head chose, `(b, h, g, k, d)`; no others are read."""
    wide = x.unsqueeze(2).expand(-1, -1, at.shape[2], -1, -1)
    return wide.gather(3, at.unsqueeze(-1).expand(*at.shape, x.shape[-1]))


def _seen(logits: Tensor, mask: Tensor | None, softcap: float | None, at: Tensor | None = None) -> Tensor:
    """Logits `(b, h, g, columns)` as the model caps and masks them; `at` names their columns, if they are not all."""
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if mask is None:
        return logits
    last = mask[:, :, -1]  # (b or 1, heads or 1, n)
    if last.dtype == torch.bool:
        last = torch.zeros_like(last, dtype=logits.dtype).masked_fill(~last, torch.finfo(logits.dtype).min)
    b, h, g = logits.shape[:3]
    last = last.expand(b, h * g, -1).view(b, h, g, -1)
    return logits + (last if at is None else last.gather(3, at))


def _weights(logits: Tensor, value: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float32).to(value.dtype)
