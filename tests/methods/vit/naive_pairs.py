"""Slow references for methods that join tokens in pairs: plain loops in float64, nothing shared with `fewer`."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from fewer.signals.heads import Attended, Heads
from fewer.types import Tokens

Vector = list[float]


def mean_keys(tokens: Tokens, row: int) -> list[Vector]:
    """The keys of one row, averaged over heads."""
    heads = tokens.signal(Heads, Attended).key[row].double().tolist()
    return [[sum(head[i][c] for head in heads) / len(heads) for c in range(len(one))] for i, one in enumerate(heads[0])]


def cosine(u: Vector, v: Vector) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


def halves(n: int, alike: Callable[[int, int], float], shut: set[int], leaving: int) -> dict[int, int]:
    """Who joins whom: even tokens propose to the odd ones most alike, and the most alike proposals are carried out."""
    proposals = []
    for i in range(0, n, 2):
        rated = [(alike(i, j), j) for j in range(1, n, 2) if j not in shut]
        if i not in shut and rated:
            best, j = max(rated)
            proposals.append((best, i, j))
    return {i: j for _, i, j in sorted(proposals, reverse=True)[:leaving]}


def grouped(n: int, joins: dict[int, int]) -> list[list[int]]:
    """The members of each slot; slots in the order of their survivors."""
    return [[i for i in range(n) if joins.get(i, i) == s] for s in range(n) if s not in joins]


def mean(x: Tensor, members: Sequence[int], mass: Sequence[float]) -> Vector:
    """The mean of some tokens of one row, weighted."""
    total = sum(mass[i] for i in members)
    return [sum(mass[i] * float(x[i, c]) for i in members) / total for c in range(x.shape[1])]
