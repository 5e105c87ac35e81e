"""One layer of a cache in closed form: what it holds when a prompt was read, as `Report.bytes_kept` counts it.

How many tokens stay is the method's own answer: its `allocate` is asked about a place without keys. Where it cannot
answer without having seen any, the data decide: then the total is known (one total for all layers), or its ceiling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fewer.codec import POSITION_BYTES, held_bytes
from fewer.cost.choosing import fixed_bytes
from fewer.cost.sizes import Decoder
from fewer.signals import Rotation
from fewer.types import Budget, MissingSignal, Site, Tokens

MIXED = "how many tokens go to each form of storage depends on the data: a ceiling"
UNEVEN = "heads keep different numbers of tokens, and blocks are filled head by head: a ceiling"
CEILING = "how many tokens stay depends on the data: a ceiling"


@dataclass(frozen=True)
class Place:
    """What every layer that is shortened has in common: of `heads` heads, keys of `d` and values of `e` features."""

    heads: int
    d: int
    e: int
    itemsize: int
    layers: int

    @classmethod
    def of(cls, host: Any, sizes: Decoder) -> "Place":
        """The layers of a host whose caches are not bounded by a window."""
        values = getattr(host.config, "v_head_dim", None) or host.head_dim
        return cls(sizes.kv_heads, host.head_dim, values, sizes.itemsize, sum(host.plain_layers()))

    @property
    def entry(self) -> int:
        """Bytes of one key and its value in full precision."""
        return (self.d + self.e) * self.itemsize

    def tokens(self, layer: int, there: int, seen: int) -> Tokens:
        """A row of the layer that holds `there` of the `seen` tokens, without their features."""
        shape = (1, self.heads, there)
        none = torch.zeros(1, 1, 1, dtype=torch.bool).expand(shape)
        positions = torch.arange(seen - there, seen).expand(shape)
        site = Site(layer, self.layers, "prefill")
        return Tokens(torch.empty(*shape, 0), positions, none, none, torch.tensor([seen]), site=site)


def kept(method: Any, budget: Budget, tokens: Tokens) -> tuple[list[int], str]:
    """Tokens that each head of a layer keeps, and what is wrong with that: "", UNEVEN (the sum is right) or CEILING."""
    try:
        found = method.allocate(tokens, torch.zeros(tokens.positions.shape), budget)
    except MissingSignal:
        share = min(budget.count(int(tokens.seen)), tokens.positions.shape[-1])
        together = any(getattr(need, "everywhere", False) for need in method.needs)
        return [share] * tokens.positions.shape[1], UNEVEN if together else CEILING
    counts: list[int] = found.counts[0].tolist()
    return counts, "" if found.floor is None else UNEVEN


def packed_bytes(policy: Any, place: Place, counts: Sequence[int], there: int) -> tuple[int, str]:
    """Bytes of the heads of one row that hold so many tokens packed, and what is wrong with that: "" or MIXED."""
    stores, share = policy.stores, getattr(policy.method, "important", None)
    at = place.d, place.e, place.itemsize
    shortened, total = any(count < there for count in counts), sum(counts) * POSITION_BYTES
    for need in policy.method.needs:
        if need.start().lasting:
            total += _numbers(stores[0], counts) * need.key_bytes
        elif shortened or isinstance(need, Rotation):  # a mass comes with the first token that goes
            total += sum(counts) * need.key_bytes
    for count in counts:
        if len(stores) == 1:
            total += held_bytes(stores[0], count, *at)
        elif share is not None:
            first = Budget(share, fraction=share).count(count) if share and count else 0
            total += held_bytes(stores[0], first, *at) + held_bytes(stores[1], count - first, *at)
        else:  # all in the larger form, and one in each of the others
            sizes = sorted(held_bytes(store, count, *at) for store in stores)
            total += sizes[-1] + sum(held_bytes(store, 1, *at) for store in stores)
    return total, MIXED if len(stores) > 1 and share is None else ""


def _numbers(store: Any, counts: Sequence[int]) -> int:
    """Numbers that a signal of one for each key holds: a rectangle, where what is packed and what waits leave gaps."""
    block = 1 if store is None else store.block
    whole, rest = [count // block * block for count in counts], [count % block for count in counts]
    gaps = any(w and r < max(rest) for w, r in zip(whole, rest, strict=True))
    return len(counts) * (max(whole) + max(rest)) if gaps else sum(counts)


def paired_bytes(place: Place, count: int, rows: int) -> int:
    """Bytes of two layers held as one, where one token of each head stays whole (see `fewer.pairs`)."""
    entries, own = rows * place.heads * count, rows * place.heads * min(1, count)
    mixed = entries - own
    numbers = sum((mixed + 2 * own) * size + 2 * mixed for size in (place.d, place.e)) * place.itemsize
    return numbers + POSITION_BYTES * (2 * own + entries)


@dataclass(frozen=True)
class Layer:
    """What a layer holds: bytes of all rows, tokens of a head on average, and remarks on what is not exact."""

    bytes: int
    held: float
    notes: frozenset[str] = frozenset()


def layer(
    policy: Any, budget: Budget, place: Place, sizes: Decoder, tokens: Tokens, *, rows: int, cuts: bool, late: bool
) -> Layer:
    """A layer at this place. `cuts`: something is decided; `late`: it was given fewer tokens than there were."""
    method, there = policy.method, tokens.positions.shape[-1]
    counts, wrong = kept(method, budget, tokens) if cuts else ([there] * place.heads, "")
    wrong = wrong if sum(counts) < place.heads * there else ""
    dense = sum(counts) == place.heads * there and not late and not policy.packs
    notes = {wrong} if policy.packs or wrong == CEILING else set()
    if dense:
        lasting = sum(need.key_bytes for need in method.needs if policy.covers("prefill") and need.start().lasting)
        total = sum(counts) * (place.entry + lasting)
    else:
        total, mixed = packed_bytes(policy, place, counts, there)
        if UNEVEN in notes:
            most = -(-sum(counts) // place.heads)
            signals = sum(
                need.key_bytes for need in method.needs if need.start().lasting
            )  # wide, where heads have gaps
            total = place.heads * int(policy.bytes_for(most, place.d, place.e, place.itemsize))
            total += place.heads * (there - most) * signals
        if notes - {""} and policy.budget.size is not None and policy.packs:  # such bytes are filled head by head
            total = max(total, policy.budget.size // (place.layers * rows))
        notes |= {mixed}
    total *= rows
    if policy.covers("prefill"):
        lives = not cuts or policy.covers("decode")
        total += fixed_bytes(method, sizes, rows, there, lives=lives, dense=dense)
    return Layer(total, sum(counts) / place.heads, frozenset(notes - {""}))
