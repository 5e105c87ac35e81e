"""Scores from attention that is recomputed for the rows that matter, in blocks: a T x T matrix never exists."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.attention import BLOCK_CELLS
from fewer.signals import QueryWindow, Step, blank


def attention_rows(
    query: Float[Tensor, "b heads q d"],
    query_positions: Int[Tensor, "b q"],
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
    scaling: float,
    softcap: float | None = None,
) -> Float[Tensor, "b heads q n"]:
    """Causal softmax attention of these queries to all keys, in float32."""
    b, heads, q, d = query.shape
    h, n = keys.shape[1], keys.shape[2]
    # float32 before the product: half precision can overflow in it
    grouped = query.reshape(b, h, -1, d).float() * scaling
    logits = (grouped @ keys.float().transpose(-1, -2)).view(b, h, heads // h, q, n)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = padding[:, :, None, :] | (positions[:, :, None, :] > query_positions[:, None, :, None])  # (b, h, q, n)
    # added, not filled in: a broadcast fill is twice the price of the softmax
    logits += torch.where(hidden, torch.finfo(torch.float32).min / 2, 0.0).unsqueeze(2)
    return logits.softmax(-1).view(b, heads, q, n)


def attention_sums(
    query: Float[Tensor, "b heads q d"],
    query_positions: Int[Tensor, "b q"],
    query_padding: Bool[Tensor, "b q"],
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
    scaling: float,
    softcap: float | None = None,
    decay: float = 1.0,
) -> Float[Tensor, "b heads n"]:
    """Attention each key receives from the real ones of these queries, summed over them, block by block.

    A query counts `decay` to the power of how many real queries of its row come after it.
    """
    b, heads, q, _ = query.shape
    n = keys.shape[2]
    counted = ~query_padding
    after = counted.flip(1).cumsum(1).flip(1) - counted.long()
    weight = decay**after * counted  # (b, q)
    query, keys = blank(query, query_padding.unsqueeze(1)), blank(keys, padding)
    total = torch.zeros(b, heads, n, device=keys.device)
    size = max(1, BLOCK_CELLS // max(1, b * heads * n))
    for start in range(0, q, size):
        at = slice(start, start + size)
        rows = attention_rows(query[:, :, at], query_positions[:, at], keys, positions, padding, scaling, softcap)
        real = weight[:, None, None, at].to(rows.dtype)
        total += (real @ rows).squeeze(2)  # the sum over real queries, in one pass
    return total


def window_attention(
    window: QueryWindow,
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
) -> Float[Tensor, "b heads n"]:
    """Mean attention that the window's real queries pay to each key, for each query head."""
    sums = attention_sums(
        window.query, window.positions, window.padding, keys, positions, padding, window.scaling, window.softcap
    )
    return sums / (~window.padding).sum(1).clamp(min=1)[:, None, None]


def received(
    step: Step,
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
    decay: float = 1.0,
) -> Float[Tensor, "b h n"]:
    """Attention each key receives from all real queries of the step, summed over queries and over its query heads."""
    sums = attention_sums(
        step.query, step.positions, step.padding, keys, positions, padding, step.scaling, step.softcap, decay
    )  # (b, heads, n)
    b, h, n = positions.shape
    return sums.view(b, h, -1, n).sum(2)


def per_head(scores: Float[Tensor, "b heads n"], h: int) -> Float[Tensor, "b h n"]:
    """Mean over the query heads that share a key-value head."""
    b, heads, n = scores.shape
    return scores.view(b, h, heads // h, n).mean(2)


def smooth(scores: Float[Tensor, "b heads n"], kernel: int, pooling: str = "mean") -> Float[Tensor, "b heads n"]:
    """Pool each score with its neighbours, stride 1. Borders count as zeros, so they are lowered, as published."""
    if pooling == "max":
        return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
