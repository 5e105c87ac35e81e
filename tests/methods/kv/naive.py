"""Slow references: each method once more, from its algorithm's text, for one row without padding and in float64.

Nothing here is shared with `fewer`. Queries are `(heads, n, d)`, keys and values `(h, n, d)`; heads/h query heads share
a key-value head. The whole n x n attention matrix is written out.
"""

import cmath
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def attention(query: Tensor, keys: Tensor, scaling: float | None = None, softcap: float | None = None) -> Tensor:
    """Causal softmax attention `(heads, n, n)`, row by row."""
    heads, n, dim = query.shape
    groups = heads // keys.shape[0]
    scaling = dim**-0.5 if scaling is None else scaling
    out = torch.zeros(heads, n, n, dtype=torch.float64)
    for head in range(heads):
        for i in range(n):
            logits = keys[head // groups, : i + 1].double() @ query[head, i].double() * scaling
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            weights = torch.exp(logits - logits.max())
            out[head, i, : i + 1] = weights / weights.sum()
    return out


def knorm(keys: Tensor) -> Tensor:
    return torch.tensor([[-math.sqrt(sum(x * x for x in key)) for key in head] for head in keys.double().tolist()])


def keydiff(keys: Tensor) -> Tensor:
    rated = []
    for head in keys.double():
        units = [key / key.norm() for key in head]
        anchor = sum(units, torch.zeros_like(units[0])) / len(units)
        rated.append([-float(unit @ anchor / anchor.norm()) for unit in units])
    return torch.tensor(rated)


def tova(query: Tensor, keys: Tensor) -> Tensor:
    """The last query's attention, averaged over all heads of the layer."""
    return attention(query, keys)[:, -1].mean(0).expand(keys.shape[:2])


def h2o(query: Tensor, keys: Tensor) -> Tensor:
    """Column sums of the attention matrix, summed over the heads that share a key-value head."""
    groups = query.shape[0] // keys.shape[0]
    columns = attention(query, keys).sum(1)
    return torch.stack([columns[g * groups : (g + 1) * groups].sum(0) for g in range(keys.shape[0])])


def snapkv(query: Tensor, keys: Tensor, window: int, kernel: int, pooling: str) -> Tensor:
    """Window attention before the window, pooled, averaged over the group; +inf in the window."""
    h, n, _ = keys.shape
    groups, before = query.shape[0] // h, max(n - window, 0)
    weights = attention(query, keys)
    out = torch.full((h, n), torch.inf, dtype=torch.float64)
    for g in range(h):
        for j in range(before):
            rated = []
            for head in range(g * groups, (g + 1) * groups):
                seen = weights[head, before:].mean(0)
                near = [float(seen[i]) if 0 <= i < before else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
                rated.append(max(near) if pooling == "max" else sum(near) / kernel)
            out[g, j] = sum(rated) / groups
    return out


def expected_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, base: float, future: int, sinks: int, eps: float
) -> Tensor:
    """Expected attention of the next `future` queries; +inf for the sinks. Pairs of channels are complex numbers."""
    heads, n, dim = query.shape
    h, half = keys.shape[0], dim // 2
    speed = [base ** -(i / half) for i in range(half)]
    turns = torch.zeros(dim, dim, dtype=torch.float64)
    for i in range(half):
        mean = sum(cmath.exp(1j * speed[i] * (n + ahead)) for ahead in range(future)) / future
        turns[i, i] = turns[i + half, i + half] = mean.real
        turns[i, i + half], turns[i + half, i] = -mean.imag, mean.imag
    out = torch.full((h, n), torch.inf, dtype=torch.float64)
    if n <= sinks:
        return out
    expected = torch.zeros(heads, n - sinks, dtype=torch.float64)
    for head in range(heads):
        samples = []
        for position in range(sinks, n):
            pairs = torch.complex(query[head, position, :half].double(), query[head, position, half:].double())
            pairs = pairs * torch.tensor([cmath.exp(-1j * speed[i] * position) for i in range(half)])
            samples.append(torch.cat([pairs.real, pairs.imag]))
        mean = sum(samples) / len(samples)
        spread = sum(torch.outer(sample - mean, sample - mean) for sample in samples) / len(samples)
        mean, spread = turns @ mean, turns @ spread @ turns.T
        logits = torch.stack(
            [
                key @ mean / dim**0.5 + key @ spread @ key / dim / 2
                for key in keys[head // (heads // h), sinks:].double()
            ]
        )
        expected[head] = torch.softmax(logits, 0)
    for g in range(h):
        shared = expected[g * heads // h : (g + 1) * heads // h].mean(0)
        out[g, sinks:] = (shared + eps) * values[g, sinks:].double().norm(dim=-1)
    return out


def best(scores: Sequence[float] | Tensor, count: int) -> list[int]:
    """The places of the `count` highest scores, in order; of equal scores the later one is the higher."""
    values = scores.tolist() if isinstance(scores, Tensor) else list(scores)
    ranked = sorted(range(len(values)), key=lambda j: (values[j], j), reverse=True)
    return sorted(ranked[:count])


def shares(total: int, ideal: Sequence[Fraction]) -> list[int]:
    """Whole numbers that add up to `total`, each its ideal rounded up or down; the largest remainders round up."""
    assert sum(ideal) == total
    parts = [math.floor(x) for x in ideal]
    behind = sorted(range(len(ideal)), key=lambda i: (parts[i] - ideal[i], i))
    for i in behind[: total - sum(parts)]:
        parts[i] += 1
    return parts


def pyramid(free: int, layers: int, beta: int, room: int) -> list[int]:
    """Tokens before the window at each layer, from `free` of them on average and at most `room`."""
    first = min(2 * free - Fraction(free, beta), Fraction(room))
    last = 2 * free - first
    return shares(free * layers, [first + (last - first) * Fraction(layer, layers - 1) for layer in range(layers)])


def adakv(scores: Tensor, count: int, floor: float) -> list[int]:
    """Tokens for each head of `count` on average: whole floors, the rest by how many of the layer's best each has."""
    h, n = scores.shape
    ranked = sorted(((float(scores[head, j]), head) for head in range(h) for j in range(n)), key=lambda x: -x[0])
    won = [sum(head == mine for _, head in ranked[: h * count]) for mine in range(h)]
    low = int(floor * count)
    rest = h * (count - low)
    return [low + more for more in shares(rest, [Fraction(rest * w, h * count) for w in won])]
