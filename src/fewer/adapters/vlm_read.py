"""Decoding steps that leave visual entries unread: one layer looks at all, deeper ones read text and what it chose.

A method asks for it by `dynamic`, a need with the first such `layer`, and `aside(attention, before, aside)`, which says
what the newest token's attention in the layer before sets aside. Everything stays in the cache. Which entries are set
aside is known by position (`Aside`), so it does not matter which of them a layer or a head holds; forwards of several
tokens read everything, and the step after them chooses anew.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewer import attention
from fewer.ragged import Part, Ragged
from fewer.signals import marked_last
from fewer.signals.aside import Aside
from fewer.types import FewerError, UnsupportedModel

if TYPE_CHECKING:
    from fewer.adapters.hf_layer import Layer


def read(
    layer: "Layer",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor | None:
    """A decoding step's attention `(b, 1, heads, e)` to what is not set aside; None where the layer is to read
    everything in the host's own way."""
    shared = layer.shared
    if shared.probing:
        return None
    first = shared.members[0]
    if layer.length == 0 or (query.shape[2] if shared.passed is None else shared.passed.total) > 1:
        if layer is first:
            _begin(first)
        return None
    known = found(first)
    if known is None:
        if _asked(shared) is not None:
            raise FewerError(
                "which entries of this cache are visual is not known, as it was forked or read without the method "
                "that sets some aside: go on with the cache that read the prompt, or pass DyCoke(read=1.0)"
            )
        return None
    need, state = known
    if layer.place < need.layer - 1:
        return None
    positions = _positions(layer, key.shape[2], shared.padding(mask, query.shape[0], 1))
    if layer.place == need.layer - 1:
        _choose(layer, need, state, query, key, positions, scaling, softcap)
        return None
    held = _entries(layer.parts, positions, key.shape[1])
    table = state.table()
    if table is None:
        layer.reads = layer.reads[0] + held, layer.reads[1] + held
        return None
    table = table.to(key.device)
    parts = [_without(part.read(), table) for part in layer.parts]
    tail = (positions >= 0) & ~_gone(table, positions)
    layer.reads = (
        layer.reads[0] + _entries(parts, positions.masked_fill(~tail, -1), key.shape[1]),
        layer.reads[1] + held,
    )
    seen = None
    if not bool(tail.all()):
        width = max(1, int(tail.sum(1).max()))
        at = marked_last(tail)[:, -width:]  # what is read comes last, in its order
        key, value = (x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])) for x in (key, value))
        seen = tail.gather(1, at)[:, None, None]
    mixed = attention.attend(query, parts, key, value, seen, scaling, softcap)
    return mixed.transpose(1, 2).contiguous()


def _asked(shared: Any) -> Any:
    """What a stage of the session asks for, if one does, and anything is to be left out at all."""
    stages = getattr(shared.cutter, "stages", None)
    if stages is None or stages.whole:
        return None
    asked = (getattr(method, "dynamic", None) for _, method, *_ in stages.cuts)
    return next((need for need in asked if need is not None), None)


def found(first: "Layer") -> tuple[Any, Aside] | None:
    """The need and the state of a cache that is read in this way."""
    return next(((need, one) for need, one in first.observers.items() if isinstance(one, Aside)), None)


def _begin(first: "Layer") -> None:
    """Several tokens are read: take in which of them are visual. A loaded cache goes on as it was read."""
    shared = first.shared
    cutter: Any = shared.cutter
    need, known = _asked(shared), found(first)
    if need is None and known is None:
        return
    if need is not None:
        if need.layer >= shared.layers:
            raise FewerError(
                f"{need} sets entries aside for layers from {need.layer} on, and this language model has "
                f"{shared.layers} with an unbounded cache: name a layer below that"
            )
        if shared.policy.packs:
            raise UnsupportedModel(
                f"{need} leaves entries of a cache in full precision unread, and store=... packs them: leave the store "
                "out, or pass DyCoke(read=1.0)"
            )
        state = known[1] if known is not None else need.start()
        others = {other: one for other, one in first.observers.items() if not isinstance(one, Aside)}
        first.observers = {**others, need: state}
    known = found(first)
    assert known is not None
    known[1].begin([] if cutter is None else cutter.books.visual, first.real)


def _positions(layer: "Layer", t: int, padding: Tensor | None) -> Tensor:
    """Positions `(b, t)` of the tail's tokens, the newest one included, which is not in the books yet; -1: padding."""
    before = layer.padding
    if before is None:
        before = torch.zeros(len(layer.real), t - 1, dtype=torch.bool, device=layer.device)
    old = layer._places(before) if layer.positions is None else layer.positions
    new = torch.tensor(layer.real, device=layer.device).unsqueeze(1)
    return torch.cat([old, new if padding is None else new.masked_fill(padding, -1)], 1)


def _entries(parts: Any, positions: Tensor, heads: int) -> int:
    """Entries of all rows and heads, in the parts and in a tail of these positions."""
    return sum(sum(map(sum, part.counts)) for part in parts) + heads * int((positions >= 0).sum())


def _gone(table: Tensor, positions: Tensor) -> Tensor:
    """Which of the entries at these positions `(b, n)` are set aside."""
    at = positions.clamp(min=0, max=table.shape[1] - 1)
    return table.gather(1, at) & (positions == at)


def _without(part: Ragged, table: Tensor) -> Part:
    """The part without what is set aside; nothing of that is touched."""
    counts = torch.tensor(part.counts, device=table.device).flatten()  # of every row and head
    heads = len(part.counts[0])
    owner = torch.arange(len(counts), device=table.device).repeat_interleave(counts)
    at = part.positions.long()
    inside = at.clamp(max=table.shape[1] - 1)
    stays = ~(table.flatten()[owner // heads * table.shape[1] + inside] & (at == inside))
    index = stays.nonzero().flatten()
    left = torch.bincount(owner[index], minlength=len(counts)).view(-1, heads).tolist()
    return Ragged(
        part.keys.index_select(0, index),
        part.values.index_select(0, index),
        part.positions[index],
        tuple(map(tuple, left)),
        None if part.placed is None else part.placed[index],
        None if part.mass is None else part.mass[index],
    )


def _choose(
    layer: "Layer",
    need: Any,
    state: Aside,
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    scaling: float,
    softcap: float | None,
) -> None:
    """Set aside, row by row, what the newest token's attention says, on average over heads."""
    (b, heads, _, d), (h, t) = query.shape, key.shape[1:3]
    grouped = query.view(b, h, heads // h, d) * scaling

    def logits(keys: Tensor, padding: Tensor, mass: Tensor | None) -> Tensor:
        x = grouped @ keys.transpose(-1, -2)  # (b, h, g, n)
        x = x if softcap is None else softcap * torch.tanh(x / softcap)
        x = x if mass is None else x + mass.log().unsqueeze(2)
        return x.masked_fill(padding.unsqueeze(2), -torch.inf)

    kept = [part.read().dense() for part in layer.parts]
    tail = positions.unsqueeze(1).expand(b, h, t)
    each = [logits(one.keys, one.padding, one.mass) for one in kept] + [logits(key, tail < 0, None)]
    weights = torch.cat(each, -1).softmax(-1, dtype=torch.float32).sum(2) / heads  # (b, h, n)
    at = torch.cat([*(one.positions for one in kept), tail], -1)
    for row in range(b):
        if int(positions[row, -1]) < 0:  # its newest token is padding, and asks for nothing
            continue
        there = at[row] >= 0
        where, longest = at[row][there], layer.real[row] + 1
        received = weights.new_zeros(longest).index_add(0, where, weights[row][there])
        holds = there.new_zeros(longest).index_fill(0, where, True)
        index = state.candidates(row, holds)
        if len(index):
            before, aside = state.earlier(row, index)
            state.put(row, index, received[index], need.aside(received[index], before, aside))
