"""Random places for methods to decide at: keys, values, padding and every signal, gathered as a host gathers them."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewer.fit import Fit, wants
from fewer.methods import METHODS, resolve
from fewer.signals import Step
from fewer.types import Method, Site, Tokens
from tests import gather
from tests.tiny import prompt, tiny

HEADS, KV_HEADS, DIM = 4, 2, 8
HERE = Site()


class PlainRotary:
    """Half-split rotary positions, the textbook form."""

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        positions = positions if positions.ndim == 3 else positions.unsqueeze(1)
        angle = positions.unsqueeze(-1) * 0.5 ** torch.arange(DIM // 2)  # (b, 1 or h, n, d/2)
        cos, sin = angle.cos(), -angle.sin() if back else angle.sin()
        left, right = x[..., : DIM // 2], x[..., DIM // 2 :]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)

    def mean_matrix(self, positions: Tensor) -> Tensor:
        basis = torch.eye(DIM).view(1, DIM, 1, DIM).expand(1, DIM, len(positions), DIM)
        return self.turn(basis, positions.unsqueeze(0)).mean(2)[0].T


def rows(lengths: Sequence[int], seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of rows of these lengths; a row's numbers depend on its index and length alone."""
    made = []
    for index, n in enumerate(lengths):
        draw = torch.Generator().manual_seed(1000 * seed + index)
        made.append(
            tuple(torch.randn(heads, n, DIM, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS))  # q, k, v
        )
    return made


def scene(
    method: Method,
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float32,
    protect: Sequence[int] = (),
    site: Site = HERE,
) -> Tokens:
    """One batch of these rows, padded at the front to the longest, with the signals the method needs."""
    longest = max(q.shape[1] for q, _, _ in parts)
    query, keys, values = (
        torch.stack([torch.nn.functional.pad(part[i], (0, 0, longest - part[i].shape[1], 0)) for part in parts])
        for i in range(3)
    )
    seen = torch.tensor([part[0].shape[1] for part in parts])
    places = torch.arange(longest) - (longest - seen).unsqueeze(1)  # (b, n), negative for padding
    padding = places < 0
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    wide = padding.unsqueeze(1).expand(-1, KV_HEADS, -1)
    positions = places.clamp(min=-1).unsqueeze(1).expand(-1, KV_HEADS, -1)
    shown = Step(
        query, places.clamp(min=0), padding, lambda: (keys, positions, wide), DIM**-0.5, None, PlainRotary(),
        hidden=query.transpose(1, 2).flatten(2),
        output=lambda: torch.randn(HEADS, DIM, HEADS * DIM, generator=torch.Generator().manual_seed(7)),
    )  # fmt: skip
    observers = {need: need.start() for need in method.needs}
    for observer in observers.values():
        observer.observe(shown)
    gather.probe(observers, shown)
    signals = {type(need): observer.value() for need, observer in observers.items()}
    protected = torch.zeros_like(wide)
    for position in protect:
        protected = protected | (positions == position)
    tokens = Tokens(keys, positions, wide, protected, seen, values, signals, site)
    return gather.together(method, [tokens])[0]


BY_HAND: dict[str, dict[str, Tensor]] = {
    "compresskv": {
        "heads": torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.1, 0.2, 0.0], [0.0, 0.2, 0.1, 0.3], [0.2, 0.1, 0.4, 0.3]]),
        "errors": torch.tensor([0.4, 0.1, 0.2, 0.3]),
    }
}
"""Fits, for four layers, of methods that only a model that answers questions can be fitted to."""


@cache
def fitted(name: str) -> Method:
    """The method of that name, with a fit to a tiny model of these sizes where it wants one."""
    made = resolve(name)
    if not wants(made) or name == "diffrate":  # whose learned rates take the place of the budget's
        return made
    if name in BY_HAND:
        return replace(made, fit=Fit(name, "", BY_HAND[name]))  # type: ignore[type-var]
    sizes = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    model = tiny("llama", num_hidden_layers=4, **sizes)
    known: Any = METHODS[name]
    return replace(known(), fit=known.fit_to(model, [prompt(64), prompt(64, seed=1)], seed=0))
