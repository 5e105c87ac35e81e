"""The one attention function for compressed caches: kept parts in any form, uneven heads, masses, and the tail of new
tokens, in one softmax. A token of mass m counts as m equal ones: log m is added to its logit.

Grouped query heads share a key-value head by being rows of one product, so keys are read once for each key-value head
and never repeated. Logits are held for a block of queries at a time.

The softmax is in float32. Products are in the model's own precision, as in transformers' "eager" attention and unlike
torch's fused one, which keeps float32 between: at 16 bits and large logits (a standard deviation of 9) outputs are off
by 1.7 % in bfloat16 and 0.2 % in float16, about ten times as much as the fused one's.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.ragged import Block, Part, runs

BLOCK_CELLS = 1 << 23
"""Most numbers of a product held at once (32 MB of float32): the bound on what attention and scores add to the peak."""


def attend(
    query: Float[Tensor, "b heads q d"],
    parts: Sequence[Part],
    keys: Float[Tensor, "b h t d"],
    values: Float[Tensor, "b h t e"],
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Float[Tensor, "b heads q e"]:
    """Attention of new queries to what was kept and to the tail.

    Args:
        query: rotated queries of the last q of the t tail tokens.
        parts: what was kept, every token of it visible to every query.
        keys, values: the tail, the new tokens included.
        mask: for the tail: boolean (True = visible) or additive, `(b, 1 or heads, q, t)`; None is causal.
        scaling: factor on the logits.
        softcap: `cap * tanh(logits / cap)` where the model caps its logits.
    """
    b, heads, q, _ = query.shape
    longest = max(
        (sum(at) for row in zip(*(p.counts for p in parts), strict=True) for at in zip(*row, strict=True)), default=0
    )
    size = max(1, BLOCK_CELLS // (b * heads * (longest + keys.shape[2])))
    if q <= size:
        return _block(query, parts, keys, values, mask, scaling, softcap, q)
    blocks = []
    for start in range(0, q, size):
        rows = slice(start, min(start + size, q))
        cut = None if mask is None else mask[:, :, rows]
        blocks.append(_block(query[:, :, rows], parts, keys, values, cut, scaling, softcap, q - start))
    return torch.cat(blocks, dim=2)


def _block(
    query: Tensor,
    parts: Sequence[Part],
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
    out = values.new_empty(b, h, grouped.shape[2], values.shape[-1])
    for at in runs(parts):
        out[at] = _mix(grouped[at], parts, at, capped[at], values[at], softcap)
    return out.view(b, heads, q, values.shape[-1])


def _mix(
    query: Tensor,
    parts: Sequence[Part],
    at: Block,
    tail: Tensor,
    values: Tensor,
    softcap: float | None,
) -> Tensor:
    """One softmax over all parts and the tail, in float32, for the heads of a block."""
    logits = []
    for part in parts:
        stored, bias = _cap(part.logits(query, at), softcap), part.bias(at)
        logits.append(stored if bias is None else stored + bias)
    weights = torch.cat([*logits, tail], dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
    *kept, last = torch.split(weights, [x.shape[-1] for x in (*logits, tail)], dim=-1)
    out: Tensor = last @ values
    for part, share in zip(parts, kept, strict=True):
        out = out + part.mix(share, at)
    return out


def _cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
