"""Places in an encoder for methods to decide at: random or hand-made tokens, with the heads of the block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewer.compress import step
from fewer.signals.heads import Attended, Heads
from fewer.types import Budget, Method, Reduction, Site, Tokens

HEADS, DIM = 2, 8


def place(
    n: int,
    *,
    rows: int = 2,
    prefix: int = 1,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
    layer: int = 1,
    layers: int = 4,
    at: int = 0,
    places: int = 1,
    features: Tensor | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mass: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    protect: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    """`n` tokens of `rows` rows; a row's numbers depend on its index and `n` alone. `lengths` pads rows at the end.

    `features` are `(b, n, d)`; `query`, `key` and `value` `(b, h, n, d)`; what is not given is random.
    """
    draw = [torch.Generator().manual_seed(1000 * seed + row) for row in range(rows)]

    def random(*shape: int) -> Tensor:
        return torch.stack([torch.randn(*shape, generator=one) for one in draw])

    query, key, value = ((random(HEADS, n, DIM) if one is None else one).to(dtype) for one in (query, key, value))
    features = (random(n, HEADS * DIM) if features is None else features).to(dtype)
    index = torch.arange(n).expand(len(features), n)
    padding = torch.zeros_like(index, dtype=torch.bool)
    if lengths is not None:
        padding = index >= torch.tensor(lengths).unsqueeze(1)
    bias = None
    if mass is not None or lengths is not None:
        ones = torch.ones(index.shape) if mass is None else mass
        bias = ones.log().masked_fill(padding, -torch.inf)[:, None, None]
    protected = (index < prefix) | torch.isin(index, torch.tensor(list(protect), dtype=torch.long))
    return Tokens(
        features, index, padding, protected, (~padding).sum(-1), value.transpose(1, 2).flatten(2),
        {Heads: Attended(query, key, value, DIM**-0.5, bias)},
        Site(layer, layers, "encode", prefix, grid, at, places), mass,
    )  # fmt: skip


def decide(method: Method, tokens: Tokens, keep: float | int = 0.5) -> Reduction:
    """The plan at this place: a share or a count of the tokens beside the protected ones."""
    beside = int(tokens.protected[0].sum())
    budget = (
        Budget(keep, tokens=keep, beside=beside)
        if isinstance(keep, int)
        else Budget(keep, fraction=keep, beside=beside)
    )
    found: Reduction = step(method, budget, tokens)
    return found


def groups(plan: Reduction, row: int = 0) -> list[list[int]]:
    """The originals in each slot of a row, slots in their order."""
    slot = plan.assign[row].tolist()
    return [[i for i, s in enumerate(slot) if s == k] for k in range(int(plan.counts[row]))]


def kept(plan: Reduction, row: int = 0) -> list[int]:
    """The originals that give slots their places."""
    return [i for i in plan.survivors[row].tolist() if i >= 0]
