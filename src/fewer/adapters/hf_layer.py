"""One layer of a transformers cache that keeps less.

model forward -> Layer.update (stores, marks) -> attention function -> Layer.attend
                                                 attends, shows observers, and when the policy says so:
                                                 Tokens -> step() -> Plan -> Parts (packed, the rest is freed)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import cache_utils

from fewer import attention
from fewer.adapters.hf_bind import MARK
from fewer.adapters.hf_policy import Policy, Shared
from fewer.adapters.hf_read import read
from fewer.adapters.hf_shorten import Passed, pass_on
from fewer.codec import PairCodec, joined, unpacked
from fewer.compress import rate, settle
from fewer.ragged import Dense, Part, Ragged, even, runs
from fewer.report import LayerReport
from fewer.signals import EveryLayer, LayerScores, Observer, Step
from fewer.types import Budget, FewerError, Method, Phase, Plan, Site, Tokens, UnsupportedModel


class Layer(cache_utils.CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's cache, in three pieces: what is held in fewer bits (`coded`), what was kept in full precision, packed
    (`kept`), and the tokens since then, dense (`keys`, `values`). Columns count through all three, in this order.

    Before anything was dropped or coded the layer does just what transformers' own would.
    """

    keys: Tensor  # type: ignore[assignment]  # never None here: empty before the first update
    values: Tensor  # type: ignore[assignment]
    is_sliding = False
    is_compileable = False
    is_croppable = True

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
        self.hidden: Tensor | None = None  # (b, t): padding in the tail
        self.positions: Tensor | None = None  # (b, t): of the tail, until it is packed, where tokens are missing in it
        self.length = 0  # columns so far, padding included: what the model counts
        self.real: list[int] = []  # real tokens of each row so far
        self.asked: tuple[int, ...] = ()
        self.since = 0  # decoding steps since the last compression
        self.pending = False
        self.due: Phase | None = None  # a compression that waits for the end of the forward
        self.seconds = 0.0
        self.reads = (0, 0)  # of all entries held in decoding steps, those that were read; where not all are
        self._held = 0  # bytes, as last counted
        self.observers: dict[Any, Observer] = {}
        self.watched: dict[Any, float] = {}  # seconds spent on each need

    # --- what transformers calls ---

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        b, h, _, d = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            key_states.new_empty(b, h, 0, d),
            value_states.new_empty(b, h, 0, value_states.shape[-1]),
        )
        self.real = [0] * b
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.shared.host.attached:
            raise FewerError(
                "this cache was made by fewer and its model is not attached: use it inside fewer.compress(...), "
                "or make it with fewer.Cache(...), which stays attached"
            )
        if self.pending:
            raise UnsupportedModel(
                f"layer {self.index}: the keys of the last forward never reached the attention function; the model "
                f"changes them on the way, or that forward failed and the cache must be made anew"
            )
        if self.due and not self.shared.probing:
            raise UnsupportedModel(
                f"layer {self.index}: {type(self.shared.policy.method).__name__} compresses at the end of a forward, "
                f"and the last one never ended; call the model that was given to fewer, and not a part of it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = True
        if self.place == 0:
            self.shared.started = self._clock()
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        if not self.shared.probing:
            self.keys, self.values = keys, values
            self._weigh()
        marked = keys.view_as(keys)  # a tensor object of its own: the mark must not outlive this forward
        setattr(marked, MARK, self)
        return marked, values

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        q = query_length if isinstance(query_length, int) else query_length.shape[0]  # positions, up to 5.2
        if q == 0:  # models ask for the mask before they touch a layer, so nothing was stored yet
            raise FewerError("no tokens were passed: an empty prompt has nothing to compress")
        return self.length + q, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name up to 5.2

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens: int) -> None:
        """Forget the last `-tokens` columns; a positive number is the length to crop to, as up to transformers 5.2."""
        gone = min(-tokens if tokens < 0 else max(self.length - tokens, 0) if tokens else 0, self.length)
        if not gone:
            return
        tail = self.keys.shape[2]
        if gone > tail and self.coded:
            raise FewerError(
                f"crop({tokens}): only the {tail} tokens since the last compression can go, the others are held packed"
            )
        if gone > tail and any(real != self.length for real in self.real):
            raise FewerError(
                f"crop({tokens}): of a batch with padding only the {tail} tokens since the last compression can go"
            )
        lost = [gone] * len(self.real) if self.hidden is None else (~self.hidden[:, -gone:]).sum(1).tolist()
        left = torch.tensor([real - count for real, count in zip(self.real, lost, strict=True)], device=self.device)
        dense = self._dense()
        if gone > tail:  # into what was packed
            plan = Plan.keep(~dense.padding & (dense.positions < left.view(-1, 1, 1)))
            columns = torch.arange(dense.positions.shape[2], device=self.device).expand_as(dense.positions)
            if self.kept is not None and self.kept.placed is not None:  # close the gap that cropping left at the end
                slots = torch.arange(plan.survivors.shape[2], device=self.device)
                plan = replace(plan, moved=left.view(-1, 1, 1) - plan.counts.unsqueeze(-1) + slots)
            index = self._carry_out(plan, dense, columns)
        else:
            b, h, n = dense.positions.shape
            index = torch.arange(n - gone, device=self.device).expand(b, h, n - gone)
            self.keys, self.values = self.keys[:, :, : tail - gone].clone(), self.values[:, :, : tail - gone].clone()
            self.hidden = None if self.hidden is None else self.hidden[:, : tail - gone].clone()
        self.real, self.length = left.tolist(), self.length - gone
        for observer in self.observers.values():
            observer.regather(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(torch.arange(len(self.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(torch.arange(len(self.real))[indices.cpu()])

    def _rows(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        at, rows = index.to(self.device), index.tolist()
        self.keys, self.values = self.keys[at], self.values[at]
        self.kept = None if self.kept is None else self.kept.rows(rows)
        self.coded = tuple(part.rows(rows) for part in self.coded)
        self.hidden = None if self.hidden is None else self.hidden[at]
        self.real = [self.real[row] for row in rows]
        self.asked = tuple(self.asked[row] for row in rows) if self.asked else ()
        for observer in self.observers.values():
            observer.rows(at)

    # --- what the attention function calls ---

    def attend(
        self,
        own: Callable[..., tuple[Tensor, Tensor | None]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to everything held, then observe and compress if it is time."""
        self.pending = False
        b, _, q, d = query.shape
        scaling = d**-0.5 if scaling is None else scaling
        if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
            raise UnsupportedModel(f"layer {self.index} attends with learned sinks or biases, which fewer cannot yet")
        out = self._attended(own, query, key, value, mask, scaling, softcap, kwargs)
        shared, policy = self.shared, self.shared.policy
        last = self.place == shared.layers - 1
        if shared.probing:
            self._probe(query, key, mask, scaling, softcap)
            if last:
                shared.forget()
            return out
        passed = shared.passed
        phase = shared.phase(q if passed is None else passed.total, self.length)
        if passed is None:
            self._count(shared.padding(mask, b, q), b, q)
        else:
            self._count_passed(passed, b, q)
        if policy.covers(phase) and not shared.frozen:
            self._observe(query, scaling, softcap)
            if phase == "prefill" and passed is None:
                pass_on(self, shared.padding(mask, b, q), q)
            self.since = 0 if phase == "prefill" else self.since + 1
            if phase == "prefill" or self.since >= policy.every:
                self.since = 0
                self.due = phase
                if not policy.together:
                    compress([self], [self], phase)
                elif last and not policy.probes:  # probing has to wait for the end of the forward
                    compress(shared.members, shared.members, phase)
        if not self.due and not shared.frozen:
            self._pack(phase)
        if last:
            shared.forget()
            if phase == "decode":
                shared.step_seconds = self._clock() - shared.started
        return out

    def _attended(
        self,
        own: Callable[..., tuple[Tensor, Tensor | None]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        parts, chosen = self.parts, read(self, query, key, value, mask, scaling, softcap)
        if not parts and chosen is None:
            capped = {} if softcap is None else {"softcap": softcap}
            return own(query, key, value, mask, scaling=scaling, **capped, **kwargs)
        if kwargs.get("dropout"):
            raise FewerError("a compressed cache is for inference: call model.eval() first")
        if chosen is not None:
            return chosen, None
        tail = None if mask is None else mask[..., -key.shape[2] :]
        if self.coded and query.shape[2] == 1:
            self.shared.transient = max(self.shared.transient, self._unpacked(key, value))
        mixed = attention.attend(query, parts, key, value, tail, scaling, softcap)
        return mixed.transpose(1, 2).contiguous(), None

    def _unpacked(self, key: Tensor, value: Tensor) -> int:
        """Most bytes that attention holds unpacked at once: the keys, or the values, of one part of one product."""
        products = [(None, slice(None))] if even(self.parts) else runs(self.parts)
        tokens = max(unpacked(part, row, heads) for part in self.coded for row, heads in products)
        return tokens * max(key.shape[-1], value.shape[-1]) * key.element_size()

    def _count(self, new: Tensor | None, b: int, q: int) -> None:
        """Take q new tokens into the books; `new` marks the padding among them."""
        self.length += q
        if new is None and self.hidden is None:
            self.real = [real + q for real in self.real]
            return
        old = torch.zeros(b, self.keys.shape[2] - q, dtype=torch.bool, device=self.device)
        new = torch.zeros(b, q, dtype=torch.bool, device=self.device) if new is None else new
        self.hidden = torch.cat([old if self.hidden is None else self.hidden, new], dim=1)
        self.real = [real + int(count) for real, count in zip(self.real, (~new).sum(1), strict=True)]

    def _count_passed(self, passed: Passed, b: int, q: int) -> None:
        """Take in the tokens of a forward that went on to this layer; the others count as read, and leave gaps."""
        if q != passed.columns.shape[1]:
            raise UnsupportedModel(
                f"layer {self.index} was given {q} tokens, and {passed.columns.shape[1]} of {passed.total} go on: "
                f"keep the cache that shortens the prompt attached while it is read"
            )
        old = self.keys.shape[2] - q
        hidden = torch.zeros(b, old, dtype=torch.bool, device=self.device) if self.hidden is None else self.hidden
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        new = (real + passed.ranks).masked_fill(passed.padding, -1)
        self.positions = torch.cat([self._places(hidden), new], dim=1)
        self.hidden = torch.cat([hidden, passed.padding], dim=1)
        self.length += passed.total
        self.real = [real + count for real, count in zip(self.real, passed.new, strict=True)]

    # --- observing and compressing ---

    @torch.no_grad()  # a graph would hold on to everything that is dropped here
    def _observe(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        q = query.shape[2]
        positions, hidden = self._tail()
        step = self._step(query, positions[:, -q:], hidden[:, -q:], self._dense_parts, scaling, softcap)
        for need in self.shared.policy.method.needs:
            start = self._clock()
            self.observers.setdefault(need, need.start()).observe(step)
            self.watched[need] = self.watched.get(need, 0.0) + self._clock() - start

    @torch.no_grad()
    def _probe(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Show a probing forward to the need that asked for it; its tokens are the last columns of `key`."""
        b, _, q, _ = query.shape
        hidden = self.shared.padding(mask, b, q)
        hidden = torch.zeros(b, q, dtype=torch.bool, device=self.device) if hidden is None else hidden
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        positions = (real + (~hidden).cumsum(1) - 1).masked_fill(hidden, -1)

        def dense() -> tuple[Tensor, Tensor, Tensor]:
            held, h = self._dense(), key.shape[1]
            return (
                torch.cat([held.keys, key[:, :, -q:]], 2),
                torch.cat([held.positions, positions.unsqueeze(1).expand(b, h, q)], 2),
                torch.cat([held.padding, hidden.unsqueeze(1).expand(b, h, q)], 2),
            )

        observer: Any = self.observers[self.shared.probing]
        observer.observe_probe(self._step(query, positions, hidden, dense, scaling, softcap))

    def _step(
        self,
        query: Tensor,
        positions: Tensor,
        padding: Tensor,
        dense: Callable[[], tuple[Tensor, Tensor, Tensor]],
        scaling: float,
        softcap: float | None,
    ) -> Step:
        host = self.shared.host
        return Step(
            query, positions, padding, dense, scaling, softcap, host.rotary,
            place=self.place, hidden=host.hidden.pop(self.index, None), output=lambda: host.output(self.index),
        )  # fmt: skip

    def _tail(self) -> tuple[Tensor, Tensor]:
        """Positions of the tail's tokens among each row's real ones, -1 for padding, and which are padding (b, t)."""
        b, t = self.keys.shape[0], self.keys.shape[2]
        hidden = self.hidden
        if hidden is None:
            hidden = torch.zeros(b, t, dtype=torch.bool, device=self.device)
        return self._places(hidden) if self.positions is None else self.positions, hidden

    def _places(self, hidden: Tensor) -> Tensor:
        """Positions of a tail without gaps, counted backwards from the row's last real token, since what came before
        the tail may have been dropped."""
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        return (real - (~hidden).flip(1).cumsum(1).flip(1)).masked_fill(hidden, -1)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is held apart from the tail."""
        return self.coded if self.kept is None else (*self.coded, self.kept)

    def _dense(self, *, unpack: bool = True) -> Dense:
        """Everything held, as one rectangle in storage order: coded (unless that is not to be unpacked), kept, tail."""
        b, h, t = self.keys.shape[:3]
        positions, hidden = (part.unsqueeze(1).expand(b, h, t) for part in self._tail())
        tail = Dense(self.keys, self.values, positions, positions, hidden)
        parts = self.parts if unpack else self.parts[len(self.coded) :]
        return Dense.join([*(part.read().dense() for part in parts), tail])

    def _dense_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        dense = self._dense()
        return dense.keys, dense.positions, dense.padding

    @property
    def fixed(self) -> int:
        """Columns that are held packed, and stay."""
        return sum(max(max(row) for row in part.counts) for part in self.coded)

    def look(self, method: Method, phase: Phase) -> tuple[Tokens, Dense, Tensor]:
        """The place a method decides at, the rectangle its plan will speak of (padding first), and the column of
        storage that each of its columns comes from."""
        dense = self._dense()
        b, h, n = dense.positions.shape
        order = torch.arange(n, device=self.device).expand(b, h, n)
        if bool((dense.padding[..., 1:] & ~dense.padding[..., :-1]).any()) or len(self.parts) > 1:
            # padding between real tokens, or tokens out of order: no part need be older than the next
            rank = torch.where(dense.padding, -1, dense.positions)
            order = rank.argsort(dim=-1, stable=True)
            dense = dense.take(order)
        signals: dict[type, Any] = {}
        for need in method.needs:
            value = self.observers[need].value() if need in self.observers else None
            if isinstance(value, Tensor):  # a number for each key; keys that were not observed have none yet
                value = torch.nn.functional.pad(value, (0, n - value.shape[-1])).gather(-1, order)
            signals[type(need)] = value
        tokens = Tokens(
            features=dense.keys,
            values=dense.values,
            positions=dense.positions,
            padding=dense.padding,
            protected=(order < self.fixed) & ~dense.padding,
            seen=torch.tensor(self.real, device=self.device),
            mass=dense.mass,
            signals=signals,
            site=Site(self.place, self.shared.layers, phase),
        )
        return tokens, dense, order

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

    def cost(self, policy: Policy) -> Callable[[int], int]:
        """Bytes of so many tokens in all rows, heads and layers, with their metadata."""
        b, h, _, d = self.keys.shape
        e, size, places = self.values.shape[-1], self.keys.element_size(), b * h * self.shared.layers
        return lambda tokens: int(places * policy.bytes_for(tokens, d, e, size))

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
            by = torch.where(there, plan.moved - chosen.placed, 0)
            chosen = replace(chosen, keys=rotary.turn(chosen.keys, by), placed=plan.moved)
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
        self.hidden = self.positions = None
        self._weigh()
        return torch.cat(layout, -1)

    @torch.no_grad()
    def _pack(self, phase: Phase) -> None:
        """Hold what fills a block in fewer bits, between two compressions."""
        stores = self.shared.policy.stores
        if len(stores) > 1 or stores[0] is None or self.keys.shape[2] < stores[0].block:
            return
        start = self._clock()
        self.due = phase
        dense = self._dense(unpack=False)
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

    # --- what a cache calls ---

    def fork(self, shared: Shared) -> "Layer":
        """A copy to go on from separately: nothing held is ever written to in place, so it can be shared."""
        other = copy(self)
        other.shared, other.observers, other.watched = shared, {}, {}
        other.reads, other._held = (0, 0), 0
        other._weigh()
        return other

    @staticmethod
    def stack(parts: "list[Layer]", shared: Shared) -> "Layer":
        """The rows of several layers of one length as one batch, everything packed."""
        one = parts[0].fork(shared)
        one.asked, one.hidden, one.coded = (), None, ()
        one.kept = Ragged.stack([part.packed() for part in parts])
        one.real = [real for part in parts for real in part.real]
        h = one.keys.shape[1]
        one.keys = one.keys.new_empty(len(one.real), h, 0, one.keys.shape[-1])
        one.values = one.values.new_empty(len(one.real), h, 0, one.values.shape[-1])
        return one

    def packed(self) -> Ragged:
        """Everything held, packed in full precision; the layer itself is left as it is."""
        if self.kept is not None and not self.keys.shape[2] and not self.coded:
            return self.kept
        return Ragged.pack(self._dense(), moved=self.kept is not None and self.kept.placed is not None)

    def report(self) -> LayerReport:
        state: Literal["compressed", "whole"] = "compressed" if self.parts else "whole"
        if not self.is_initialized:
            return LayerReport(self.index, state, (), (), (), 0, 0, 0, 0.0)
        b, h, t, d = self.keys.shape
        tail = [t] * b if self.hidden is None else (~self.hidden).sum(1).tolist()
        counts = [part.counts for part in self.parts]
        kept = tuple(
            tuple(sum(count[row][head] for count in counts) + tail[row] for head in range(h)) for row in range(b)
        )
        entry = (d + self.values.shape[-1]) * self.keys.element_size()
        metadata = sum(observer.nbytes for observer in self.observers.values())
        metadata += 0 if self.hidden is None else self.hidden.nbytes
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


@torch.no_grad()
def compress(sources: Sequence[Layer], targets: Sequence[Layer], phase: Phase) -> None:
    """Decide for what the sources hold, together, by the targets' policy, and have the targets hold what is left.

    They are the same layers, or the targets are copies that another policy is tried on.
    """
    policy = targets[0].shared.policy
    for layer in targets:
        layer.due = phase
    if not policy.idle:
        start = sources[0]._clock()
        budget = policy.budget.within(sources[0].cost(policy))
        looked = [source.look(policy.method, phase) for source in sources]
        rated = [rate(policy.method, tokens) for tokens, _, _ in looked]
        every: dict[type, Any] = {EveryLayer: LayerScores(tuple(rated))}
        for target, (tokens, dense, order), scores in zip(targets, looked, rated, strict=True):
            tokens = replace(tokens, signals={**tokens.signals, **every})
            plan = settle(policy.method, budget, tokens, scores)
            target.taken(target._take(plan, dense, order, budget, tokens.signals))
        if policy.pairs is not None:
            couples = policy.pairs.couples(len(targets))
            for lower, upper in couples:
                _couple(targets[lower], targets[upper], policy.pairs)
            if not couples:
                targets[0].shared.note(f"of {len(targets)} layers none are held in pairs: there are too few")
        took = sources[0]._clock() - start
        for layer in targets:
            layer.seconds += took / len(targets)
    for layer in targets:
        layer.due = None


def _couple(lower: Layer, upper: Layer, pairs: PairCodec) -> None:
    """Hold what both layers were just left with as one. It stays where it is in storage: behind what was coded."""
    if lower.kept is None or upper.kept is None:  # nothing new
        return
    for layer, part in zip((lower, upper), pairs.encode_pair(lower.kept, upper.kept), strict=True):
        layer.coded, layer.kept = (*layer.coded, part), None
        layer._weigh()


def _right_aligned(columns: Tensor) -> Tensor:
    """The same columns with the empty ones (-1) first, as `Ragged.dense` lays them out, and no wider than needed."""
    there = columns >= 0
    order = there.to(torch.int8).argsort(dim=-1, stable=True)
    widest = int(there.sum(-1).max()) if there.numel() else 0
    return columns.gather(-1, order)[..., columns.shape[-1] - widest :]
