"""What a layer attended with, made by hand: a prompt of some words, n visual tokens, and a question."""

import math

import torch
from torch import Tensor

from fewer.signals.visual import Looked
from tests.methods.vlm.build import random


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary positions, the textbook form."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def look(
    n: int,
    *,
    lead: int = 3,
    words: int = 6,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 8,
    hidden: int = 8,
    seed: int = 0,
    query: Tensor | None = None,
    key: Tensor | None = None,
    states: Tensor | None = None,
    still: bool = False,
) -> Looked:
    """`lead` words, n visual tokens, `words` more. `query` and `key` are those of all of them, before they are turned;
    `still` leaves them as they are."""
    m = lead + n + words
    query = random(heads, m, d, seed=seed + 300) if query is None else query
    key = random(kv_heads, m, d, seed=seed + 400) if key is None else key
    d = query.shape[-1]
    angle = torch.arange(m).unsqueeze(1) * 0.5 ** torch.arange(d // 2) * (not still)
    cos, sin = (torch.cat([one, one], -1) for one in (angle.cos(), angle.sin()))
    text = torch.cat([torch.arange(lead), torch.arange(lead + n, m)])
    return Looked(
        query=turned(query, cos, sin)[:, text],
        key=turned(key, cos, sin),
        plain_query=query[:, text],
        plain_key=key,
        visual=torch.arange(lead, lead + n),
        text=text,
        before=0,
        states=random(len(text), hidden, seed=seed + 500) if states is None else states,
        after=text >= lead,
        scaling=d**-0.5,
        turns=torch.stack([cos, sin]),
    )


def asked(logits: list[list[float]], states: Tensor | None = None) -> Looked:
    """A prompt that begins with its picture, and whose words (rows) have these logits for its tokens (columns), and
    none for one another: one head, no positions."""
    given = torch.tensor(logits)
    words, n = given.shape
    d = words + words % 2
    query, key = torch.zeros(1, n + words, d), torch.zeros(1, n + words, d)
    query[0, n:, :words] = torch.eye(words) * d**0.5
    key[0, :n, :words] = given.T
    return look(n, lead=0, words=words, query=query, key=key, states=states, still=True)


def attention(looked: Looked, *, plain: bool = False) -> list[list[list[float]]]:
    """Head by head, text token by text token, over all of the context: written out in plain Python."""
    query, key = (looked.plain_query, looked.plain_key) if plain else (looked.query, looked.key)
    q, k, groups = query.tolist(), key.tolist(), len(query) // len(key)
    out: list[list[list[float]]] = []
    for head, rows in enumerate(q):
        out.append([])
        for row, at in zip(rows, looked.text.tolist(), strict=True):
            seen = k[head // groups][: at + 1]
            e = [math.exp(looked.scaling * sum(a * b for a, b in zip(row, one, strict=True))) for one in seen]
            out[-1].append([x / sum(e) for x in e] + [0.0] * (len(k[0]) - at - 1))
    return out
