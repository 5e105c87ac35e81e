"""What a host does beside showing observers one forward at one layer: probing, and the scores of every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewer.compress import rate
from fewer.signals import EveryLayer, LayerScores, Step
from fewer.types import Method, Tokens


def probe(observers: Mapping[Any, Any], step: Step) -> None:
    """Show probing needs random queries and keys in place of a model that reads what they ask for after `step`.

    A row's numbers depend on that row alone, so that padding and its neighbours cannot change them.
    """
    keys, positions, padding = step.dense()
    b, h, _, d = keys.shape
    heads, filler = step.query.shape[1], 50.0
    ended = torch.where(padding, -1, positions)[:, 0].amax(-1)
    for need, observer in observers.items():
        if not getattr(need, "probe", False):
            continue
        ids = torch.zeros_like(step.positions)
        for item, (more, real) in enumerate(need.inputs(ids, ~step.padding)):
            assert more.shape == real.shape
            query = torch.full((b, heads, more.shape[1], d), filler)
            new = torch.full((b, h, more.shape[1], d), filler)
            for row in range(b):
                draw = torch.Generator().manual_seed(int(keys[row, 0, -1].double().abs().sum() * 1e6) + item)
                count = int(real[row].sum())
                query[row, :, real[row]] = torch.randn(heads, count, d, generator=draw)
                new[row, :, real[row]] = torch.randn(h, count, d, generator=draw)
            places = (ended.unsqueeze(1) + real.cumsum(1)).masked_fill(~real, -1)
            wide = places.unsqueeze(1).expand(b, h, -1)
            held = torch.cat([keys, new.to(keys.dtype)], 2), torch.cat([positions, wide], 2)
            shown = (*held, torch.cat([padding, wide < 0], 2))
            observer.observe_probe(
                replace(
                    step, query=query.to(keys.dtype), positions=places, padding=~real, dense=_gives(shown), hidden=None
                )
            )


def _gives(shown: tuple[Tensor, Tensor, Tensor]) -> Any:
    return lambda: shown


def together(method: Method, places: Sequence[Tokens]) -> list[Tokens]:
    """The places of all layers, each with the scores of every one, where the method asks for them."""
    if not any(isinstance(need, EveryLayer) for need in method.needs):
        return list(places)
    every = LayerScores(tuple(rate(method, tokens) for tokens in places))
    return [replace(tokens, signals={**tokens.signals, EveryLayer: every}) for tokens in places]
