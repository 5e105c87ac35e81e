"""What one layer of a cache holds, and how a plan is carried out on it. Of the model it knows nothing.

    coded   in fewer bits, packed once and for all
    kept    in full precision, packed
    tail    the tokens since then, dense: `keys`, `values`

Columns count through all three, in this order.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import cache_utils

from fewer.adapters.hf_policy import Shared
from fewer.codec import joined
from fewer.ragged import Dense, Part, Ragged
from fewer.report import LayerReport
from fewer.signals import Observer, marked_last
from fewer.types import Budget, FewerError, Phase, Plan, UnsupportedModel


@dataclass(frozen=True)
class Waiting:
    """What compressing needs of a forward that may be cropped first: nothing is decided by guesses."""

    query: Tensor
    scaling: float
    softcap: float | None
    hidden: Tensor | None
    """The hidden states that the layer was given, where a method asks for them."""

    def rows(self, index: Tensor) -> "Waiting":
        return replace(self, query=self.query[index], hidden=None if self.hidden is None else self.hidden[index])


class Held(cache_utils.CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The holding half of a `Layer`. Before anything was dropped or coded all of it is tail."""

    keys: Tensor  # type: ignore[assignment]  # never None here: empty before the first update
    values: Tensor  # type: ignore[assignment]

    def __init__(self, shared: Shared, index: int, place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = shared
        self.index = index  # in the model
        self.place = place  # among the layers that can be shortened
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False
        self.coded: tuple[Part, ...] = ()
        self.kept: Ragged | None = None
        self.padding: Tensor | None = None  # (b, t): padding in the tail
        self.positions: Tensor | None = None  # (b, t): of the tail, until it is packed, where tokens are missing in it
        self.length = 0  # columns so far, padding included: what the model counts
        self.real: list[int] = []  # real tokens of each row so far
        self.asked: tuple[int, ...] = ()
        self.since = 0  # decoding steps since the last compression
        self.pending = False
        self.due: Phase | None = None  # a compression that waits for the end of the forward
        self.waits: Waiting | None = None  # a forward that waits for being cropped
        self.seconds = 0.0
        self.reads = (0, 0)  # of all entries held in decoding steps, those that were read; where not all are
        self._held = 0  # bytes, as last counted
        self.observers: dict[Any, Observer] = {}
        self.watched: dict[Any, float] = {}  # seconds spent on each need

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            key_states.new_empty(b, h, 0, d),
            value_states.new_empty(b, h, 0, value_states.shape[-1]),
        )
        self.real = [0] * b
        self.is_initialized = True

    # --- as one rectangle ---

    def _tail(self) -> tuple[Tensor, Tensor]:
        """Positions of the tail's tokens among each row's real ones, -1 for padding, and which are padding (b, t)."""
        b, t = self.keys.shape[0], self.keys.shape[2]
        padding = self.padding
        if padding is None:
            padding = torch.zeros(b, t, dtype=torch.bool, device=self.device)
        return self._places(padding) if self.positions is None else self.positions, padding

    def _places(self, padding: Tensor) -> Tensor:
        """Positions of a tail without gaps, counted backwards from the row's last real token, since what came before
        the tail may have been dropped."""
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        return (real - (~padding).flip(1).cumsum(1).flip(1)).masked_fill(padding, -1)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is held apart from the tail."""
        return self.coded if self.kept is None else (*self.coded, self.kept)

    def turned(self, part: Part) -> Part:
        """A part as attention reads it: keys that are held at their source go to where they are placed."""
        if not (isinstance(part, Ragged) and part.source):
            return part
        rotary = self.shared.host.rotary
        assert rotary is not None and part.placed is not None, "or they had not been moved"
        by = (part.placed - part.positions).long()
        return replace(part, keys=rotary.turn(part.keys[None, None], by[None])[0, 0], source=False)

    def _dense(self, *, unpack: bool = True, turned: bool = True) -> Dense:
        """Everything held, as one rectangle in storage order: coded (unless that is not to be unpacked), kept, tail; as
        attention reads it, or with keys at their source."""
        b, h, t = self.keys.shape[:3]
        positions, padding = (part.unsqueeze(1).expand(b, h, t) for part in self._tail())
        tail = Dense(self.keys, self.values, positions, positions, padding)
        parts = self.parts if unpack else self.parts[len(self.coded) :]
        return Dense.join([*((self.turned(part) if turned else part).read().dense() for part in parts), tail])

    def _dense_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        dense = self._dense()
        return dense.keys, dense.positions, dense.padding

    @property
    def fixed(self) -> int:
        """Columns that are held packed, and stay."""
        return sum(self.widths[: len(self.coded)])

    @property
    def widths(self) -> list[int]:
        """Columns that each part and the tail take in storage."""
        return [*(max(max(row) for row in part.counts) for part in self.parts), self.keys.shape[2]]

    @property
    def packed_counts(self) -> list[int]:
        """Tokens that each row and head holds in fewer bits."""
        each = [[count for row in part.counts for count in row] for part in self.coded]
        return [sum(counts) for counts in zip(*each, strict=True)]

    def _coded_columns(self) -> list[Tensor]:
        """The columns `(b, h, columns)` of each part that is held packed, -1 where a head has fewer than others."""
        found, start = [], 0
        for part in self.coded:
            counts = torch.tensor(part.counts, device=self.device).unsqueeze(-1)
            end = start + int(counts.max())
            columns = torch.arange(start, end, device=self.device)
            found.append(torch.where(columns >= end - counts, columns, -1))
            start = end
        return found

    # --- after a plan ---

    def _take(
        self, plan: Plan, dense: Dense, order: Tensor, budget: Budget, signals: Mapping[type, Any]
    ) -> Tensor | None:
        """Carry a plan out: pack the survivors, and let go of the rest. None if there was nothing to do, else where
        the columns of storage come from."""
        available = (~dense.padding).sum(-1)
        self.asked = tuple(budget.count(real) for real in self.real)
        if plan.note:
            self.shared.note(plan.note)
        pairs = self.shared.policy.pairs
        joins = pairs is not None and any(self.place in couple for couple in pairs.couples(self.shared.layers))
        stays = not self.shared.policy.packs and not self.parts and plan.mass is None and not plan.folds and not joins
        stays = stays and self.positions is None
        if stays and bool((plan.counts == available).all()):
            return None  # stay as transformers has it
        return self._carry_out(plan, dense, order, signals)

    def _carry_out(self, plan: Plan, dense: Dense, order: Tensor, signals: Mapping[type, Any] | None = None) -> Tensor:
        """Hold what the plan keeps, and nothing else; where the new columns of storage come from `(b, h, columns)`.

        A plan that names no tiers means the first. `signals` are what was gathered, by this layer if None.
        """
        there = plan.survivors >= 0
        old = there & (order.gather(2, plan.survivors.clamp(min=0)) < self.fixed)  # held packed already, and left so
        chosen = dense.take(plan.survivors)
        if plan.folds:
            members = torch.zeros_like(plan.survivors).scatter_add(-1, plan.slot.clamp(min=0), (plan.slot >= 0).long())
            if bool((old & (members > 1)).any()):
                raise FewerError("tokens cannot be merged into ones that are held packed; merge before storing")
            chosen = replace(chosen, keys=plan.apply(dense.keys), values=plan.apply(dense.values))
        if plan.mass is not None:
            chosen = replace(chosen, mass=plan.mass.float())
        moved = plan.moved is not None or (self.kept is not None and self.kept.placed is not None)
        if plan.moved is not None:
            rotary = self.shared.host.rotary
            if rotary is None:
                raise UnsupportedModel("the plan moves keys to other positions, and the model has no rotary embedding")
            if bool(old.any()):
                raise FewerError("keys that are held packed cannot be moved to other positions")
            if self._lasting(chosen.positions[there], chosen.placed[there]):
                chosen = replace(chosen, aim=plan.moved)
            else:
                by = torch.where(there, plan.moved - chosen.placed, 0)
                chosen = replace(chosen, keys=rotary.turn(chosen.keys, by), placed=plan.moved, aim=None)
        layout = self._coded_columns()
        coded, came = list(self.coded), order.gather(2, plan.survivors.clamp(min=0))
        new = plain = there & ~old  # what is left in `plain` is held in full precision, of whatever tier
        for tier, store in enumerate(self.shared.policy.stores):
            if store is None or (plan.tier is None and tier):
                continue
            mine = new if plan.tier is None else new & (plan.tier == tier)
            store.check(self.keys.shape[-1], self.values.shape[-1])
            whole, _ = Ragged.pack(replace(chosen, padding=~mine), moved=moved).cut(store.block)
            if len(whole.positions):
                counts = torch.tensor(whole.counts, device=self.device).unsqueeze(-1)
                first = mine & (mine.cumsum(-1) <= counts)
                if signals is None:
                    signals = {type(need): observer.value() for need, observer in self.observers.items()}
                whole = self.turned(whole).read()
                part, columns = store.encode(whole, self.due or "decode", signals), came.masked_fill(~first, -1)
                for at in reversed(range(len(coded))):  # each tier goes on in a part of its own
                    if (both := joined(coded[: at + 1], part)) is not None:
                        coded[at], layout[at] = both, _right_aligned(torch.cat([layout[at], columns], -1))
                        break
                else:
                    coded.append(part)
                    layout.append(_right_aligned(columns))
                plain = plain & ~first
        self.coded, self.kept = tuple(coded), None
        if bool(plain.any()) or not coded:
            self.kept = Ragged.pack(replace(chosen, padding=~plain), moved=moved)
            layout.append(_right_aligned(came.masked_fill(~plain, -1)))
        # empty tensors of their own: a slice would hold the whole prompt's keys
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.padding = self.positions = None
        self._weigh()
        return torch.cat(layout, -1)

    def _lasting(self, positions: Tensor, placed: Tensor) -> bool:
        """Whether keys that move are to be held at their source: turned again and again, those of 16 bits drift, since
        a turn that is smaller than their rounding is lost each time."""
        again = self.shared.policy.covers("decode") and self.keys.element_size() < 4
        return again and bool((positions == placed).all())

    @torch.no_grad()
    def _pack(self, phase: Phase) -> None:
        """Hold what fills a block in fewer bits, between two compressions; and a tail that tokens are missing in, whose
        positions the next tokens could not go on from."""
        stores = self.shared.policy.stores
        # where tokens are dropped, a later turn may have to drop these too, and could not if they were packed
        store = stores[0] if len(stores) == 1 and self.shared.policy.budget.whole else None
        if self.positions is None and (store is None or self.keys.shape[2] < store.block):
            return
        start = self._clock()
        self.due = phase
        dense = self._dense(unpack=False, turned=False)
        columns = self.fixed + torch.arange(dense.positions.shape[2], device=self.device).expand_as(dense.positions)
        self.taken(self._carry_out(Plan.keep(~dense.padding), dense, columns))
        self.due = None
        self.seconds += self._clock() - start

    def taken(self, index: Tensor | None) -> None:
        """The columns of storage were changed: tell those who count along them."""
        if index is not None:
            for observer in self.observers.values():
                observer.regather(index)
        if not self.shared.policy.covers("decode"):  # the next prefill brings its own queries
            self.observers = {need: o for need, o in self.observers.items() if o.lasting}

    def _weigh(self) -> None:
        """Keep the books on what all layers hold."""
        held = self.keys.nbytes + self.values.nbytes + sum(part.nbytes for part in self.parts)
        self.shared.held += held - self._held
        self._held = held
        self.shared.peak = max(self.shared.peak, self.shared.held)

    def _clock(self) -> float:
        if self.is_initialized and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # --- what it says of itself ---

    def report(self) -> LayerReport:
        state: Literal["compressed", "whole"] = "compressed" if self.parts else "whole"
        if not self.is_initialized:
            return LayerReport(self.index, state, (), (), (), 0, 0, 0, 0.0)
        b, h, t, d = self.keys.shape
        tail = [t] * b if self.padding is None else (~self.padding).sum(1).tolist()
        counts = [part.counts for part in self.parts]
        kept = tuple(
            tuple(sum(count[row][head] for count in counts) + tail[row] for head in range(h)) for row in range(b)
        )
        entry = (d + self.values.shape[-1]) * self.keys.element_size()
        metadata = sum(observer.nbytes for observer in self.observers.values())
        metadata += 0 if self.padding is None else self.padding.nbytes
        metadata += sum(part.metadata for part in self.parts)
        data = self.keys.nbytes + self.values.nbytes + sum(part.nbytes - part.metadata for part in self.parts)
        return LayerReport(
            layer=self.index,
            state=state,
            seen=tuple(self.real),
            asked=self.asked,
            kept=kept,
            bytes_full=b * h * self.length * entry,
            bytes_kept=data + metadata,
            metadata=metadata,
            seconds=self.seconds + sum(self.watched.values()),
            residual=self._waiting(),
            read=self.reads[0] / self.reads[1] if self.reads[1] else 1.0,
        )

    def _waiting(self) -> int:
        """Bytes of keys and values in full precision that will be stored in fewer bits."""
        if self.shared.policy.stores[-1] is None:
            return 0
        tail = self.keys.nbytes + self.values.nbytes
        first = self.shared.policy.stores[0] is None  # then what is kept in full precision stays so
        return tail + (0 if self.kept is None or first else self.kept.nbytes - self.kept.metadata)


def _right_aligned(columns: Tensor) -> Tensor:
    """The same columns with the empty ones (-1) first, as `Ragged.dense` lays them out, and no wider than needed."""
    there = columns >= 0
    widest = int(there.sum(-1).max()) if there.numel() else 0
    return columns.gather(-1, marked_last(there))[..., columns.shape[-1] - widest :]
