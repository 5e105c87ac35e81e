"""Scores from attention that is recomputed for the rows that matter, in blocks: a T x T matrix never exists."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.signals import QueryWindow, Step

BLOCK_CELLS = 1 << 23
"""Most logits held at once (32 MB of float32): the bound on what scoring adds to the peak."""


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
    logits = (query.reshape(b, h, -1, d) @ keys.transpose(-1, -2)).view(b, h, heads // h, q, n).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = padding[:, :, None, :] | (positions[:, :, None, :] > query_positions[:, None, :, None])  # (b, h, q, n)
    logits.masked_fill_(hidden.unsqueeze(2), torch.finfo(torch.float32).min)
    return logits.softmax(-1).view(b, heads, q, n)


def window_attention(
    window: QueryWindow,
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
) -> Float[Tensor, "b heads n"]:
    """Mean attention that the window's real queries pay to each key, for each query head."""
    rows = attention_rows(
        window.query, window.positions, keys, positions, padding, window.scaling, window.softcap
    )  # (b, heads, w, n)
    real = (~window.padding).float()[:, None, :, None]
    return (rows * real).sum(2) / real.sum(2).clamp(min=1)


def received(
    step: Step,
    keys: Float[Tensor, "b h n d"],
    positions: Int[Tensor, "b h n"],
    padding: Bool[Tensor, "b h n"],
) -> Float[Tensor, "b h n"]:
    """Attention each key receives from all real queries of the step, summed over queries and over its query heads."""
    b, heads, q, _ = step.query.shape
    h, n = keys.shape[1], keys.shape[2]
    total = torch.zeros(b, h, n, device=keys.device)
    size = max(1, BLOCK_CELLS // (b * heads * n))
    for start in range(0, q, size):
        at = slice(start, start + size)
        rows = attention_rows(
            step.query[:, :, at], step.positions[:, at], keys, positions, padding, step.scaling, step.softcap
        )
        rows = rows * (~step.padding[:, at]).float()[:, None, :, None]
        total += rows.sum(2).view(b, h, heads // h, n).sum(2)
    return total


def per_head(scores: Float[Tensor, "b heads n"], h: int) -> Float[Tensor, "b h n"]:
    """Mean over the query heads that share a key-value head."""
    b, heads, n = scores.shape
    return scores.view(b, h, heads // h, n).mean(2)


def smooth(scores: Float[Tensor, "b heads n"], kernel: int, pooling: str = "mean") -> Float[Tensor, "b heads n"]:
    """Pool each score with its neighbours, stride 1. Borders count as zeros, so they are lowered, as published."""
    if pooling == "max":
        return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
