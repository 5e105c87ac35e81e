"""One layer of a transformers cache that keeps less.

model forward -> Layer.update (stores, marks) -> attention function -> Layer.attend
                                                 attends, shows observers, and when the policy says so:
                                                 decide(): Tokens -> rate() -> settle() -> Plan -> Parts (packed,
                                                 the rest is freed)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewer import attention
from fewer.adapters import hf_surgery
from fewer.adapters.hf_among import attend_among, takes_part
from fewer.adapters.hf_bind import MARK
from fewer.adapters.hf_decide import decide
from fewer.adapters.hf_held import Held, Waiting
from fewer.adapters.hf_passed import Passed
from fewer.adapters.hf_read import read
from fewer.adapters.hf_shorten import pass_on
from fewer.codec import unpacked
from fewer.ragged import runs
from fewer.signals import Step
from fewer.signals.visual import VisualEntries
from fewer.types import FewerError, Phase, UnsupportedModel


class Layer(Held):  # type: ignore[no-untyped-call]
    """One layer's cache, as transformers calls it and as its attention is rerouted to it.

    Before anything was dropped or coded the layer does just what transformers' own would.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    # --- what transformers calls ---

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
        hf_surgery.crop(self, tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        hf_surgery.choose(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        hf_surgery.choose(self, torch.arange(len(self.real)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        hf_surgery.choose(self, torch.arange(len(self.real))[indices.cpu()])

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
        shared, policy = self.shared, self.shared.policy
        some = takes_part(self, q)
        out = None if some else self._attended(own, query, key, value, mask, scaling, softcap, kwargs)
        last = self.place == shared.layers - 1
        if shared.probing:
            self._probe(query, key, mask, scaling, softcap)
            if last:
                shared.forget()
            assert out is not None, "a probing forward attends to everything"
            return out
        passed = shared.passed
        phase = shared.phase(q if passed is None else passed.total, self.length)
        if passed is None:
            self._count(shared.padding(mask, b, q), b, q)
        else:
            self._count_passed(passed, b, q)
        if shared.cutter is not None and self.index in shared.cutter.after and q > 1:
            shared.witness = query, self._dense(), scaling  # now, as it may be cut in a moment
        if shared.recording and not shared.frozen:
            self.waits = Waiting(query, scaling, softcap, shared.host.hidden.pop(self.index, None))
        else:
            if policy.covers(phase) and not shared.frozen:
                self._observe(query, scaling, softcap)
                if some:  # who takes part is seen from what was observed
                    out = attend_among(self, query, key, value, scaling, softcap), None
                if phase == "prefill" and passed is None:
                    pass_on(self, shared.padding(mask, b, q), q)
            self._compress(phase, q)
        if last:
            shared.forget()
            if phase == "decode":
                shared.step_seconds = self._clock() - shared.started
        assert out is not None
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
        mixed = attention.attend(query, [self.turned(part) for part in parts], key, value, tail, scaling, softcap)
        return mixed.transpose(1, 2).contiguous(), None

    def _unpacked(self, key: Tensor, value: Tensor) -> int:
        """Most bytes that attention holds unpacked at once: the keys, or the values, of one part of one product."""
        tokens = max(unpacked(part, at) for part in self.coded for at in runs(self.parts))
        return tokens * max(key.shape[-1], value.shape[-1]) * key.element_size()

    def _count(self, new: Tensor | None, b: int, q: int) -> None:
        """Take q new tokens into the books; `new` marks the padding among them."""
        self.length += q
        if new is None and self.padding is None:
            self.real = [real + q for real in self.real]
            return
        old = torch.zeros(b, self.keys.shape[2] - q, dtype=torch.bool, device=self.device)
        new = torch.zeros(b, q, dtype=torch.bool, device=self.device) if new is None else new
        self.padding = torch.cat([old if self.padding is None else self.padding, new], dim=1)
        self.real = [real + count for real, count in zip(self.real, (~new).sum(1).tolist(), strict=True)]

    def _count_passed(self, passed: Passed, b: int, q: int) -> None:
        """Take in the tokens of a forward that went on to this layer; the others count as read, and leave gaps."""
        if q != passed.columns.shape[1]:
            raise UnsupportedModel(
                f"layer {self.index} was given {q} tokens, and {passed.columns.shape[1]} of {passed.total} go on: "
                f"keep the cache that shortens the prompt attached while it is read"
            )
        old = self.keys.shape[2] - q
        padding = torch.zeros(b, old, dtype=torch.bool, device=self.device) if self.padding is None else self.padding
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        new = (real + passed.ranks).masked_fill(passed.padding, -1)
        self.positions = torch.cat([self._places(padding), new], dim=1)
        self.padding = torch.cat([padding, passed.padding], dim=1)
        self.length += passed.total
        self.real = [real + count for real, count in zip(self.real, passed.new, strict=True)]

    # --- observing and compressing ---

    def _compress(self, phase: Phase, new: int) -> None:
        """Compress if it is time, else pack what fills a block; `new` columns came since this was asked last."""
        shared, policy = self.shared, self.shared.policy
        if shared.frozen:
            return
        if policy.covers(phase):
            self.since += new
            if phase == "prefill" or self.since >= policy.every:
                self.since = 0
                self.due = phase
                if not policy.together:
                    decide([self], [self], phase)
                elif self.place == shared.layers - 1 and not policy.probes:  # those wait for the end of the forward
                    decide(shared.members, shared.members, phase)
        if not self.due:
            self._pack(phase)

    def resume(self, phase: Phase, gone: int) -> None:
        """Go on after a forward whose last `gone` tokens were guessed wrong, and are cropped."""
        waits, self.waits = self.waits, None
        stay = 0 if waits is None else waits.query.shape[2] - gone
        if waits is None or stay <= 0 or self.shared.frozen:
            return
        if self.shared.policy.covers(phase):
            if waits.hidden is not None:
                self.shared.host.hidden[self.index] = waits.hidden[:, :stay]
            self._observe(waits.query[:, :, :stay], waits.scaling, waits.softcap)
        self._compress(phase, stay)

    @torch.no_grad()  # a graph would hold on to everything that is dropped here
    def _observe(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        q = query.shape[2]
        positions, padding = self._tail()
        step = self._step(query, positions[:, -q:], padding[:, -q:], self._dense_parts, scaling, softcap)
        for need in self.shared.policy.method.needs:
            if isinstance(need, VisualEntries):  # which is not watched, but known
                continue
            start = self._clock()
            self.observers.setdefault(need, need.start()).observe(step)
            self.watched[need] = self.watched.get(need, 0.0) + self._clock() - start

    @torch.no_grad()
    def _probe(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Show a probing forward to the need that asked for it; its tokens are the last columns of `key`."""
        b, _, q, _ = query.shape
        padding = self.shared.padding(mask, b, q)
        padding = torch.zeros(b, q, dtype=torch.bool, device=self.device) if padding is None else padding
        real = torch.tensor(self.real, device=self.device).unsqueeze(1)
        positions = (real + (~padding).cumsum(1) - 1).masked_fill(padding, -1)

        def dense() -> tuple[Tensor, Tensor, Tensor]:
            held, h = self._dense(), key.shape[1]
            return (
                torch.cat([held.keys, key[:, :, -q:]], 2),
                torch.cat([held.positions, positions.unsqueeze(1).expand(b, h, q)], 2),
                torch.cat([held.padding, padding.unsqueeze(1).expand(b, h, q)], 2),
            )

        observer: Any = self.observers[self.shared.probing]
        observer.observe_probe(self._step(query, positions, padding, dense, scaling, softcap))

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
            place=self.place, hidden=host.hidden.pop(self.index, None), output=partial(host.output, self.index),
        )  # fmt: skip
