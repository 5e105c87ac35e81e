"""The one attention function for compressed caches: packed, uneven heads and the tail of new tokens, in one softmax.

Grouped query heads share a key-value head by being rows of one product, so keys are read once for each key-value head
and never repeated. Logits are held for a block of queries at a time.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.ragged import Ragged

BLOCK_CELLS = 1 << 23
"""Most logits held at once (32 MB of float32)."""


def attend(
    query: Float[Tensor, "b heads q d"],
    kept: Ragged,
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Float[Tensor, "b heads q e"]:
    """Attention of new queries to what was kept and to the tail.

    Args:
        query: rotated queries of the last q of the t tail tokens.
        kept: packed keys and values, every one visible to every query.
        keys, values: the tail, the new tokens included.
        mask: for the tail: boolean (True = visible) or additive, `(b, 1 or heads, q, t)`; None is causal.
        scaling: factor on the logits.
        softcap: `cap * tanh(logits / cap)` where the model caps its logits.
    """
    b, heads, q, _ = query.shape
    t, longest = keys.shape[2], max((count for row in kept.counts for count in row), default=0)
    size = max(1, BLOCK_CELLS // (b * heads * (longest + t)))
    if q <= size:
        return _block(query, kept, keys, values, mask, scaling, softcap, q)
    parts = []
    for start in range(0, q, size):
        rows = slice(start, min(start + size, q))
        cut = None if mask is None else mask[:, :, rows]
        parts.append(_block(query[:, :, rows], kept, keys, values, cut, scaling, softcap, q - start))
    return torch.cat(parts, dim=2)


def _block(
    query: Tensor,
    kept: Ragged,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    left: int,
) -> Tensor:
    """One block of queries; its first query is `left` tokens before the tail's end."""
    b, heads, q, d = query.shape
    h, t = keys.shape[1], keys.shape[2]
    grouped = (query * scaling).reshape(b, h, heads // h * q, d)  # query heads of a group become rows
    tail = grouped @ keys.transpose(-1, -2)  # (b, h, g*q, t)
    capped = _cap(tail, softcap)
    if mask is None and left > 1:
        row, column = torch.arange(q, device=keys.device), torch.arange(t, device=keys.device)
        mask = (column <= (t - left) + row[:, None])[None, None]
    if mask is not None:
        seen = capped.view(b, heads, q, t)
        if mask.dtype == torch.bool:
            seen = seen.masked_fill(~mask, torch.finfo(seen.dtype).min)
        else:
            seen = seen + mask
        capped = seen.view(b, h, -1, t)
    if kept.even is not None:
        k, e = kept.even, values.shape[-1]
        stored = grouped @ kept.keys.view(b, h, k, d).transpose(-1, -2)
        return _mix(stored, capped, kept.values.view(b, h, k, e), values, softcap).view(b, heads, q, e)
    out = values.new_empty(b, h, grouped.shape[2], values.shape[-1])
    for at, run, span in kept.runs:
        k = (span.stop - span.start) // (run.stop - run.start)
        stored = grouped[at, run] @ kept.keys[span].view(run.stop - run.start, k, d).transpose(-1, -2)
        kept_values = kept.values[span].view(run.stop - run.start, k, values.shape[-1])
        out[at, run] = _mix(stored, capped[at, run], kept_values, values[at, run], softcap)
    return out.view(b, heads, q, values.shape[-1])


def _mix(stored: Tensor, tail: Tensor, kept: Tensor, values: Tensor, softcap: float | None) -> Tensor:
    """One softmax over both parts, in float32."""
    k = stored.shape[-1]
    weights = torch.cat([_cap(stored, softcap), tail], dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
    return weights[..., :k] @ kept + weights[..., k:] @ values


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
