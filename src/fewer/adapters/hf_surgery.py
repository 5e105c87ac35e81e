"""What is done to a layer between forwards, and no method decides: tokens are cropped, rows chosen, copies made."""

from copy import copy
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from fewer.adapters.hf_held import Held
from fewer.adapters.hf_policy import Shared
from fewer.ragged import Ragged
from fewer.types import FewerError, Plan

H = TypeVar("H", bound=Held)


def crop(layer: Held, tokens: int) -> None:
    """Forget the last `-tokens` columns; a positive number is the length to crop to, as up to transformers 5.2."""
    gone = min(-tokens if tokens < 0 else max(layer.length - tokens, 0) if tokens else 0, layer.length)
    if not gone:
        return
    tail = layer.keys.shape[2]
    if gone > tail and layer.coded:
        raise FewerError(
            f"crop({tokens}): only the {tail} tokens since the last compression can go, the others are held packed"
        )
    if gone > tail and any(real != layer.length for real in layer.real):
        raise FewerError(
            f"crop({tokens}): of a batch with padding only the {tail} tokens since the last compression can go"
        )
    padding = layer.padding
    lost = [gone] * len(layer.real) if padding is None else (~padding[:, -gone:]).sum(1).tolist()
    left = torch.tensor([real - count for real, count in zip(layer.real, lost, strict=True)], device=layer.device)
    dense = layer._dense(turned=False)
    if gone > tail:  # into what was packed
        plan = Plan.keep(~dense.padding & (dense.positions < left.view(-1, 1, 1)))
        columns = torch.arange(dense.positions.shape[2], device=layer.device).expand_as(dense.positions)
        if layer.kept is not None and layer.kept.placed is not None:  # close the gap that cropping left at the end
            slots = torch.arange(plan.survivors.shape[2], device=layer.device)
            plan = replace(plan, moved=left.view(-1, 1, 1) - plan.counts.unsqueeze(-1) + slots)
        index = layer._carry_out(plan, dense, columns)
    else:
        b, h, n = dense.positions.shape
        index = torch.arange(n - gone, device=layer.device).expand(b, h, n - gone)
        stays = slice(tail - gone)
        layer.keys, layer.values = layer.keys[:, :, stays].clone(), layer.values[:, :, stays].clone()
        layer.padding = None if padding is None else padding[:, stays].clone()
    layer.real, layer.length = left.tolist(), layer.length - gone
    for observer in layer.observers.values():
        observer.regather(index)


def choose(layer: Held, index: Tensor) -> None:
    """Hold these rows, in this order, once or several times each."""
    if not layer.is_initialized:
        return
    at, rows, before = index.to(layer.device), index.tolist(), layer.widths
    layer.keys, layer.values = layer.keys[at], layer.values[at]
    layer.kept = None if layer.kept is None else layer.kept.rows(rows)
    layer.coded = tuple(part.rows(rows) for part in layer.coded)
    layer.padding = None if layer.padding is None else layer.padding[at]
    layer.real = [layer.real[row] for row in rows]
    layer.asked = tuple(layer.asked[row] for row in rows) if layer.asked else ()
    layer.waits = None if layer.waits is None else layer.waits.rows(at)
    for observer in layer.observers.values():
        observer.rows(at)
    if layer.place == 0 and layer.shared.cutter is not None:  # what it knows of rows is of all layers
        layer.shared.cutter.choose(at)
    if (after := layer.widths) == before:
        return
    # the row that held most has left, and with it the columns that only it filled: the first of a part
    ends = torch.tensor(before).cumsum(0).tolist()
    columns = torch.cat([torch.arange(end - have, end) for end, have in zip(ends, after, strict=True)]).to(layer.device)
    for observer in layer.observers.values():
        observer.regather(columns.expand(len(rows), layer.keys.shape[1], -1))


def fork(layer: H, shared: Shared) -> H:
    """A copy to go on from separately: nothing held is ever written to in place, so it can be shared."""
    other = copy(layer)
    other.shared, other.observers, other.watched = shared, {}, {}
    other.reads, other._held = (0, 0), 0
    other._weigh()
    return other


def stack(layers: list[H], shared: Shared) -> H:
    """The rows of several layers of one length as one batch, everything packed."""
    one = fork(layers[0], shared)
    one.asked, one.padding, one.coded = (), None, ()
    one.kept = Ragged.stack([packed(layer) for layer in layers])
    one.real = [real for layer in layers for real in layer.real]
    h = one.keys.shape[1]
    one.keys = one.keys.new_empty(len(one.real), h, 0, one.keys.shape[-1])
    one.values = one.values.new_empty(len(one.real), h, 0, one.values.shape[-1])
    return one


def packed(layer: Held) -> Ragged:
    """Everything held, packed in full precision; the layer itself is left as it is."""
    if layer.kept is not None and not layer.keys.shape[2] and not layer.coded:
        return layer.turned(layer.kept).read()
    return Ragged.pack(layer._dense(), moved=layer.kept is not None and layer.kept.placed is not None)
