"""One layer of a transformers cache that keeps less.

model forward -> Layer.update (stores, marks) -> attention function -> Layer.attend
                                                 attends, shows observers, and when the policy says so:
                                                 Tokens -> step() -> Plan -> Ragged (packed, the rest is freed)
"""

import time
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast
from weakref import ref

import torch
from torch import Tensor
from transformers import cache_utils

from fewer import attention
from fewer.adapters.hf_bind import MARK, Host
from fewer.compress import step
from fewer.ragged import Dense, Ragged
from fewer.signals import Observer, Step
from fewer.types import (
    Budget,
    FewerError,
    FewerWarning,
    LayerReport,
    Method,
    Plan,
    Site,
    Tokens,
    UnsupportedModel,
)

When = Literal["prefill", "decode", "both"]


@dataclass(frozen=True)
class Policy:
    """What to do, and when."""

    method: Method
    budget: Budget
    when: When = "prefill"
    every: int = 64

    @classmethod
    def of(cls, method: Method, budget: Budget, when: str, every: int) -> "Policy":
        if when not in ("prefill", "decode", "both"):
            raise FewerError(f"when={when!r}: compress at 'prefill', 'decode' or 'both'")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise FewerError(f"every={every!r}: a number of decoding steps, at least 1")
        return cls(method, budget, cast(When, when), every)

    def covers(self, phase: str) -> bool:
        return self.when in (phase, "both")


@dataclass
class Shared:
    """What the layers of one cache have in common."""

    host: Host
    policy: Policy
    layers: int
    frozen: bool = False
    notes: list[str] = field(default_factory=list)
    _mask: Any = None
    _hidden: Tensor | None = None

    def note(self, text: str) -> None:
        """A remark that the user must hear of once, and that the report repeats."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, FewerWarning, stacklevel=2)

    def forget(self) -> None:
        """The forward is over; hold nothing of its mask and its positions."""
        self._mask = self._hidden = None
        if self.host.rotary is not None:
            self.host.rotary.forget()

    def padding(self, mask: Tensor | None, b: int, q: int) -> Tensor | None:
        """Which of the q new tokens are padding (b, q), or None for none: what the mask hides from its last row.

        All layers are given the same mask, so it is read once a forward.
        """
        if mask is None:
            return None
        if self._mask is None or self._mask() is not mask:
            if mask.ndim != 4:
                raise UnsupportedModel(f"the attention mask has shape {tuple(mask.shape)}, not (batch, heads, q, kv)")
            last = mask[:, 0, -1, -q:]
            hidden = (~last if last.dtype == torch.bool else last < 0).expand(b, q)
            self._mask, self._hidden = ref(mask), hidden if bool(hidden.any()) else None
        return self._hidden


class Layer(cache_utils.CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's cache: what was kept, packed (`kept`), and the tokens since then, dense (`keys`, `values`).

    Before anything was dropped `kept` is None and the layer does just what transformers' own would.
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
        self.kept: Ragged | None = None
        self.hidden: Tensor | None = None  # (b, t): padding in the tail
        self.length = 0  # columns so far, padding included: what the model counts
        self.real: list[int] = []  # real tokens of each row so far
        self.asked: tuple[int, ...] = ()
        self.since = 0  # decoding steps since the last compression
        self.pending = False
        self.seconds = 0.0
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
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.pending = True
        marked = self.keys.view_as(self.keys)  # a tensor object of its own: the mark must not outlive this forward
        setattr(marked, MARK, self)
        return marked, self.values

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
            index = _right_aligned(plan.survivors, columns)
            if self.kept is not None and self.kept.placed is not None:  # close the gap that cropping left at the end
                slots = torch.arange(plan.survivors.shape[2], device=self.device)
                plan = replace(plan, moved=left.view(-1, 1, 1) - plan.counts.unsqueeze(-1) + slots)
            self._carry_out(plan, dense)
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
        if self.kept is None:
            capped = {} if softcap is None else {"softcap": softcap}
            out = own(query, key, value, mask, scaling=scaling, **capped, **kwargs)
        elif kwargs.get("dropout"):
            raise FewerError("a compressed cache is for inference: call model.eval() first")
        else:
            tail = None if mask is None else mask[..., -self.keys.shape[2] :]
            mixed = attention.attend(query, self.kept, self.keys, self.values, tail, scaling, softcap)
            out = mixed.transpose(1, 2).contiguous(), None
        phase: Literal["prefill", "decode"] = "prefill" if q > 1 or self.length == 0 else "decode"
        self._count(self.shared.padding(mask, b, q), b, q)
        if self.place == self.shared.layers - 1:
            self.shared.forget()
        if self.shared.policy.covers(phase) and not self.shared.frozen:
            self._observe(query, scaling, softcap)
            self.since = 0 if phase == "prefill" else self.since + 1
            if phase == "prefill" or self.since >= self.shared.policy.every:
                self._compress(phase)
                self.since = 0
        return out

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

    # --- observing and compressing ---

    @torch.no_grad()  # a graph would hold on to everything that is dropped here
    def _observe(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        q = query.shape[2]
        positions, hidden = self._tail()
        rotary = self.shared.host.rotary
        step = Step(query, positions[:, -q:], hidden[:, -q:], self._dense_parts, scaling, softcap, rotary)
        for need in self.shared.policy.method.needs:
            start = self._clock()
            self.observers.setdefault(need, need.start()).observe(step)
            self.watched[need] = self.watched.get(need, 0.0) + self._clock() - start

    def _tail(self) -> tuple[Tensor, Tensor]:
        """Positions of the tail's tokens among each row's real ones, -1 for padding, and which are padding (b, t)."""
        b, t = self.keys.shape[0], self.keys.shape[2]
        hidden = self.hidden
        if hidden is None:
            hidden = torch.zeros(b, t, dtype=torch.bool, device=self.device)
        # counted backwards from the row's last real token, since what came before the tail may have been dropped
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        return (real - (~hidden).flip(1).cumsum(1).flip(1)).masked_fill(hidden, -1), hidden

    def _dense(self) -> Dense:
        """Everything held, as one rectangle in storage order: kept, then the tail."""
        b, h, t = self.keys.shape[:3]
        positions, hidden = (part.unsqueeze(1).expand(b, h, t) for part in self._tail())
        if self.kept is None:
            return Dense(self.keys, self.values, positions, positions, hidden)
        kept = self.kept.dense()
        return Dense(
            torch.cat([kept.keys, self.keys], 2),
            torch.cat([kept.values, self.values], 2),
            torch.cat([kept.positions, positions], 2),
            torch.cat([kept.placed, positions], 2),
            torch.cat([kept.padding, hidden], 2),
        )

    def _dense_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        dense = self._dense()
        return dense.keys, dense.positions, dense.padding

    def decide(self, method: Method, budget: Budget, phase: Literal["prefill", "decode"]) -> tuple[Plan, Dense, Tensor]:
        """The plan, the rectangle it speaks of (padding first), and where that has its columns from."""
        dense = self._dense()
        b, h, n = dense.positions.shape
        order = torch.arange(n, device=self.device).expand(b, h, n)
        if bool((dense.padding[..., 1:] & ~dense.padding[..., :-1]).any()):  # padding between real tokens
            order = (~dense.padding).to(torch.int8).argsort(dim=-1, stable=True)
            wide = order.unsqueeze(-1)
            dense = Dense(
                dense.keys.gather(2, wide.expand_as(dense.keys)),
                dense.values.gather(2, wide.expand_as(dense.values)),
                dense.positions.gather(2, order),
                dense.placed.gather(2, order),
                dense.padding.gather(2, order),
            )
        signals = {}
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
            protected=torch.zeros_like(dense.padding),
            seen=torch.tensor(self.real, device=self.device),
            signals=signals,
            site=Site(self.place, self.shared.layers, phase),
        )
        return step(method, budget, tokens), dense, order

    def token_bytes(self, method: Method) -> int:
        """One token in all rows, heads and layers, with its metadata: what a budget in bytes is divided by."""
        b, h, _, d = self.keys.shape
        held = (d + self.values.shape[-1]) * self.keys.element_size() + 4  # each entry knows its position
        return int(b * h * (held + sum(need.key_bytes for need in method.needs)) * self.shared.layers)

    @torch.no_grad()
    def _compress(self, phase: Literal["prefill", "decode"]) -> None:
        policy = self.shared.policy
        budget = policy.budget
        if budget.whole:
            return
        start = self._clock()
        budget = budget.within(self.token_bytes(policy.method))
        plan, dense, order = self.decide(policy.method, budget, phase)
        if self._take(plan, dense, budget):
            for observer in self.observers.values():
                observer.regather(_right_aligned(plan.survivors, order))
        if not policy.covers("decode"):  # the next prefill brings its own queries
            self.observers = {need: o for need, o in self.observers.items() if o.lasting}
        self.seconds += self._clock() - start

    def _take(self, plan: Plan, dense: Dense, budget: Budget) -> bool:
        """Carry a plan out: pack the survivors, and let go of the rest. False if there was nothing to let go of."""
        available = (~dense.padding).sum(-1)
        self.asked = tuple(budget.count(real) for real in self.real)
        if plan.note:
            self.shared.note(plan.note)
        if self.kept is None and bool((plan.counts == available).all()):
            return False  # stay as transformers has it
        self._carry_out(plan, dense)
        return True

    def _carry_out(self, plan: Plan, dense: Dense) -> None:
        there = plan.survivors >= 0
        at = plan.survivors.clamp(min=0)
        chosen = Dense(
            plan.pick(dense.keys),
            plan.pick(dense.values),
            dense.positions.gather(2, at),
            dense.placed.gather(2, at),
            ~there,
        )
        moved = plan.moved is not None or (self.kept is not None and self.kept.placed is not None)
        if plan.moved is not None:
            rotary = self.shared.host.rotary
            if rotary is None:
                raise UnsupportedModel("the plan moves keys to other positions, and the model has no rotary embedding")
            by = torch.where(there, plan.moved - chosen.placed, 0)
            chosen = replace(chosen, keys=rotary.turn(chosen.keys, by), placed=plan.moved)
        self.kept = Ragged.pack(chosen, moved=moved)
        # empty tensors of their own: a slice would hold the whole prompt's keys
        self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()
        self.hidden = None

    def _clock(self) -> float:
        if self.is_initialized and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # --- what a cache calls ---

    def under(self, shared: Shared) -> "Layer":
        """A copy under another policy, compressed at once by it; this layer stays as it is."""
        other = self.fork(shared)
        other.asked = ()
        policy, start = shared.policy, self._clock()
        if not policy.budget.whole:
            budget = policy.budget.within(self.token_bytes(policy.method))
            plan, dense, _ = self.decide(policy.method, budget, "prefill")
            other._take(plan, dense, budget)
        other.seconds = self._clock() - start + sum(self.watched.get(need, 0.0) for need in policy.method.needs)
        return other

    def fork(self, shared: Shared) -> "Layer":
        """A copy to go on from separately: nothing held is ever written to in place, so it can be shared."""
        other = copy(self)
        other.shared, other.observers, other.watched = shared, {}, {}
        return other

    @staticmethod
    def stack(parts: "list[Layer]", shared: Shared) -> "Layer":
        """The rows of several layers of one length as one batch, everything packed."""
        one = parts[0].fork(shared)
        one.asked, one.hidden = (), None
        one.kept = Ragged.stack([part.packed() for part in parts])
        one.real = [real for part in parts for real in part.real]
        h = one.keys.shape[1]
        one.keys = one.keys.new_empty(len(one.real), h, 0, one.keys.shape[-1])
        one.values = one.values.new_empty(len(one.real), h, 0, one.values.shape[-1])
        return one

    def packed(self) -> Ragged:
        """Everything held, packed; the layer itself is left as it is."""
        if self.kept is not None and not self.keys.shape[2]:
            return self.kept
        return Ragged.pack(self._dense(), moved=self.kept is not None and self.kept.placed is not None)

    def report(self) -> LayerReport:
        state: Literal["compressed", "whole"] = "whole" if self.kept is None else "compressed"
        if not self.is_initialized:
            return LayerReport(self.index, state, (), (), (), 0, 0, 0, 0.0)
        b, h, t, d = self.keys.shape
        tail = [t] * b if self.hidden is None else (~self.hidden).sum(1).tolist()
        stored = ((0,) * h,) * b if self.kept is None else self.kept.counts
        kept = tuple(tuple(count + more for count in row) for row, more in zip(stored, tail, strict=True))
        entry = (d + self.values.shape[-1]) * self.keys.element_size()
        metadata = sum(observer.nbytes for observer in self.observers.values())
        metadata += 0 if self.hidden is None else self.hidden.nbytes
        metadata += 0 if self.kept is None else self.kept.metadata
        data = self.keys.nbytes + self.values.nbytes
        data += 0 if self.kept is None else self.kept.nbytes - self.kept.metadata
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
        )


def _right_aligned(survivors: Tensor, order: Tensor) -> Tensor:
    """Survivors as columns of the storage they came from, empty slots first: how `Ragged.dense` will lay them out."""
    there = survivors >= 0
    columns = torch.where(there, order.gather(-1, survivors.clamp(min=0)), -1)
    return columns.gather(-1, there.to(torch.int8).argsort(dim=-1, stable=True))
