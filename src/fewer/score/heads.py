"""Ratings of an encoder's tokens from the heads of one block."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.signals.heads import Attended

BLOCK_CELLS = 1 << 22
"""Most attention weights held at once (16 MB of float32)."""


def head_mean(keys: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n d"]:
    """Keys averaged over heads, what ToMe calls its metric."""
    return keys.mean(1)


def attention(attended: Attended, rows: Int[Tensor, " q"] | slice = slice(None)) -> Float[Tensor, "b h q n"]:
    """Attention weights of some queries, all of them unless told; each row sums to one."""
    logits = attended.query[:, :, rows] @ attended.key.transpose(-1, -2) * attended.scaling
    if attended.relative is not None:
        logits = logits + attended.relative[:, :, rows]
    return (logits if attended.bias is None else logits + attended.bias).softmax(-1)


def class_attention(attended: Attended) -> Float[Tensor, "b h n"]:
    """What the first token, the class token, attends to."""
    return attention(attended, slice(0, 1))[:, :, 0]


def received(attended: Attended) -> Float[Tensor, "b n"]:
    """The mean attention each token gets, over heads and the queries that are there; blocks of queries at a time."""
    b, h, n, _ = attended.query.shape
    step = max(1, BLOCK_CELLS // (b * h * n))
    padding = None if attended.bias is None else attended.bias[:, 0, 0].isneginf()
    total = attended.query.new_zeros(b, n, dtype=torch.float32)
    for start in range(0, n, step):
        weights = attention(attended, slice(start, start + step))
        if padding is not None:
            weights = weights.masked_fill(padding[:, None, start : start + step, None], 0)
        total += weights.sum((1, 2), dtype=torch.float32)  # half precision would make most of them equal
    there = n if padding is None else (~padding).sum(-1, keepdim=True)
    return total / (h * there)


def attention_got(attended: Attended, prefix: int) -> Float[Tensor, "b n"]:
    """What the class token attends to, averaged over heads; where there is none, what all attend to."""
    return class_attention(attended).float().mean(1) if prefix and attended.classed else received(attended)


def votes(attended: Attended, start: Float[Tensor, "b n"], rounds: int) -> Float[Tensor, "b h n"]:
    """Power iteration on each head's attention: `rounds` times every token hands what it has on to those it attends to.

    Rows sum to one, so the total stays what it was; keys of bias -inf get nothing. Some rows of the batch at a time.
    """
    b, h, n, _ = attended.query.shape
    step = max(1, BLOCK_CELLS // (h * n * n))
    out = []
    for first in range(0, b, step):
        rows = slice(first, first + step)
        bias, relative = (None if one is None else one[rows] for one in (attended.bias, attended.relative))
        query, key, value = attended.query[rows], attended.key[rows], attended.value[rows]
        weights = attention(Attended(query, key, value, attended.scaling, bias, relative)).float()
        if relative is not None:  # a host's mask may leave padding nobody to attend to
            weights = weights.nan_to_num()
        has = start[rows, None, None].float().expand(-1, h, 1, n)
        for _ in range(rounds):
            has = has @ weights
        out.append(has.squeeze(2))
    return torch.cat(out)


def significance(attended: Attended, prefix: int) -> Float[Tensor, "b n"]:
    """What each token adds to the class token's output: attention times the norm of its value, summed over heads (ATS).

    Where there is no class token, what it adds to all outputs, on average.
    """
    if prefix and attended.classed:
        paid = class_attention(attended).float()
    else:
        there = torch.ones_like(attended.query[:, 0, :, 0], dtype=torch.float32)
        if attended.bias is not None:
            there = there.masked_fill(attended.bias[:, 0, 0].isneginf(), 0)
        paid = votes(attended, there / there.sum(-1, keepdim=True), 1)
    added: Tensor = paid * attended.value.float().norm(dim=-1)
    return added.sum(1)


def quarters(layers: int) -> list[int]:
    """The fourth, seventh and tenth of twelve blocks, where EViT and DynamicViT prune, and the like at other depths."""
    return [min(layers - 1, round(layers * at)) for at in (0.25, 0.5, 0.75)]
