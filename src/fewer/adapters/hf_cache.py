"""The compressed cache of a transformers decoder.

with fewer.compress(model, ...)      a forward pre-hook passes a Cache where the call brings none; `generate` then
                                     carries it along as it would its own (hf_session)
past_key_values=fewer.Cache(...)     the same object, made by the user
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from transformers import cache_utils

from fewer.adapters import hf_save, hf_shorten, hf_surgery, vlm_read
from fewer.adapters.hf_bind import Host
from fewer.adapters.hf_decide import decide
from fewer.adapters.hf_layer import Layer
from fewer.adapters.hf_policy import Policy, Shared
from fewer.allocate.levels import Levels, levelled
from fewer.methods import name_of, resolve, resolve_store
from fewer.report import LayerReport, Report
from fewer.types import Budget, BudgetError, FewerError, Keep, Method


class Cache(cache_utils.Cache):  # type: ignore[misc]
    """A cache to pass as `past_key_values`, compressed by a method as it fills.

    The model's attention goes through fewer for as long as the cache lives (or until `release()`, or the end of a
    `with` block); other caches on the same model behave as always.

    Args:
        model: a transformers decoder.
        method, keep, when, every, store: as in `fewer.compress`.

    Raises:
        BudgetError, UnknownName, MissingSignal, UnsupportedModel: see `fewer.types`. Nothing is changed then.

    >>> model = tiny_llama()
    >>> with fewer.Cache(model, "knorm", keep=8) as cache:
    ...     out = model(torch.arange(40).unsqueeze(0), past_key_values=cache)
    >>> cache.get_seq_length(), cache.report.layers[0].kept
    (40, ((8, 8),))
    """

    layers: list[Any]

    def __init__(
        self,
        model: Any,
        method: str | Method,
        keep: Keep | Sequence[Any] = 1.0,
        *,
        when: str | None = None,
        every: int | None = None,
        store: Any = None,
    ) -> None:
        policy = Policy.of(*levelled(resolve(method), keep), when, every, resolve_store(store))
        self._fill(Host.of(model), policy)
        self._attach()

    def _attach(self) -> None:
        self._attachment = self.shared.host.attach(self.shared.policy.method, self.shared.policy.cutter is not None)
        self._release = finalize(self, self._attachment.release)

    def save(self, path: str | Path) -> None:
        """Write all that is held, with the method, the budget and the positions, as one safetensors file.

        Raises:
            FewerError: the cache holds something that a file cannot, such as a method of your own.
        """
        self._resume()
        hf_save.save(self, path)

    @classmethod
    def load(cls, model: Any, path: str | Path) -> "Cache":
        """A cache as it was saved, attached to the same model: it goes on with the same tokens, or with one more turn.

        Raises:
            FewerError: no such file, not a saved cache, truncated or changed since, or saved from another model.
        """
        cache: Cache = hf_save.load(cls, model, path)
        cache._attach()
        return cache

    @classmethod
    def within(cls, host: Host, policy: Policy) -> "Cache":
        """A cache that somebody else keeps the model attached for."""
        cache = cls.__new__(cls)
        cache._fill(host, policy)
        return cache

    def _fill(self, host: Host, policy: Policy) -> None:
        host.gives(policy.method)
        for store in policy.stores:
            if store is not None:
                store.check(host.head_dim, getattr(host.config, "v_head_dim", None) or host.head_dim)
        layers, ours = host.layers(), host.plain_layers()
        self.shared = Shared(host, policy, sum(ours))
        if policy.cutter is not None:
            self.shared.cutter = policy.cutter()
        place = 0
        for index, mine in enumerate(ours):
            if mine:
                layers[index] = Layer(self.shared, index, place)
                place += 1
        if place < len(layers):
            self.shared.notes.append(f"{len(layers) - place} sliding-window layers are left alone")
        if isinstance(policy.method, Levels):
            policy.method.check(place)
        if getattr(policy.method, "shortens", None) is not None:
            self.shared.notes.append(hf_shorten.prepare(host, policy.method, layers))
        if self.shared.cutter is not None and self.shared.cutter.after:
            hf_shorten.prepare_later(min(self.shared.cutter.after), layers)
        super().__init__(layers=layers)
        self._adopt(layers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its books are Python; the layers around it compile
    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == 0 and len({layer.length for layer in self.layers if isinstance(layer, Layer)}) > 1:
            raise FewerError(
                "an earlier forward with this cache failed half way, so that some layers have read tokens which "
                "others have not; make the cache anew"
            )
        if layer_idx == 0:
            if self.shared.members[0].waits is not None:
                self.expect(key_states.shape[2], 0)  # nobody cropped, so nobody is guessing
            self._room(key_states.shape[2])
            self._guessed(key_states.shape[2])
        passed = self.shared.passed
        if layer_idx == 0 and passed is not None and 0 not in passed.seen:
            self.shared.passed = None  # of a forward that failed
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _room(self, new: int) -> None:
        """Refuse, before anything is stored, a prompt of which nothing could stay: packed tokens fill the budget."""
        policy, parts = self.shared.policy, self.shared.members[0].coded
        most = policy.budget.tokens
        if most is None or new == 1 or not parts or self.shared.frozen or not policy.covers("prefill"):
            return
        if self.shared.recording == "answer":
            return
        rows = [[count for part in parts for count in part.counts[row]] for row in range(len(parts[0].counts))]
        if all(sum(row) >= most * len(parts[0].counts[0]) for row in rows):
            raise BudgetError(
                f"keep={policy.budget.keep!r}: {most} tokens a head are packed already, and stay, so none of the {new} "
                f"new ones would; give keep as a fraction, leave store= out, or freeze() the cache, which keeps what "
                f"comes from now on"
            )

    # --- assisted decoding: what is read may be cropped again, so it is compressed when `crop` has said what stays ---

    def activate_past_recording(self) -> None:
        """`generate` begins to guess: every forward from now on is followed by a `crop`."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.shared.recording = "prompt"

    def expect(self, new: int, guesses: int) -> None:
        """The next forward brings `new` tokens, the last of them guesses; if there are any, a `crop` will follow."""
        self._resume()
        answer = guesses == new - 1 and self.get_seq_length()
        self.shared.recording = None if not guesses else "answer" if answer else "prompt"

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        before = self.shared.members[0].length
        super().crop(tokens_to_remove)
        self._resume(before - self.shared.members[0].length)

    def _resume(self, gone: int | None = None) -> None:
        """Compress what waited: the last forward, of which the last `gone` tokens were cropped; None if nobody did."""
        first, shared = self.shared.members[0], self.shared
        if first.waits is None:
            return
        q = first.waits.query.shape[2]
        checked = shared.recording == "answer" and gone is not None
        phase = "decode" if checked else shared.phase(q, first.length + (gone or 0) - q)
        shared.recording = "answer"
        for layer in shared.members:
            layer.resume(phase, gone or 0)

    def _guessed(self, new: int) -> None:
        """Refuse, before anything is stored, guesses along with a prompt where they could not be told from it."""
        shared, method = self.shared, self.shared.policy.method
        while_reading = any(getattr(method, name, None) is not None for name in ("shortens", "among"))
        if shared.recording != "prompt" or new == 1 or shared.frozen:
            return
        if while_reading or shared.policy.probes or shared.cutter is not None:
            raise FewerError(
                f"{type(method).__name__} decides while a prompt is read, and assisted decoding reads guesses with it: "
                f"generate without an assistant and prompt lookup, or with a method that does not"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        """A copy to go on with in another way; the model is not copied."""
        host = self.shared.host
        memo |= {id(host): host, id(host.rotary): host.rotary}
        other = Cache.__new__(Cache)
        own = {name: part for name, part in vars(self).items() if name not in ("_attachment", "_release")}
        other.__dict__.update(deepcopy(own, memo))
        other._adopt(other.layers)
        if hasattr(self, "_release") and self._release.alive:
            other._attach()
        return other

    def settle(self) -> None:
        """Compress what waits for the end of a forward."""
        members = self.shared.members
        if due := members[-1].due:
            decide(members, members, due)
            self.shared.forget()

    def freeze(self) -> None:
        """Compress no more: what comes from now on is kept whole."""
        self.shared.frozen = True

    def release(self) -> None:
        """Give the model's attention back. The cache can then only be read inside `fewer.compress(model, ...)`."""
        if hasattr(self, "_release"):
            self._release()

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    @property
    def report(self) -> Report:
        """What it holds now, layer by layer, and what compressing took."""
        layers = []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Layer):
                layers.append(layer.report())
            else:
                held = 0  # of the storages: transformers' own layers may hold more than the window they show
                if layer.is_initialized:
                    held = sum(part.untyped_storage().nbytes() for part in (layer.keys, layer.values))
                layers.append(LayerReport(index, "left alone", (), (), (), held, held, 0, 0.0))
        policy = self.shared.policy
        return Report(
            name_of(policy.method),
            policy.budget.keep,
            tuple(layers),
            tuple(self.shared.notes),
            self.shared.peak,
            self.shared.transient,
            self.shared.step_seconds,
        )

    def under(self, method: str | Method, keep: Keep | Sequence[Any], *, store: Any = None) -> "Cache":
        """What this cache would be under another method and budget, as a new, frozen cache; this one stays as it is.

        For comparisons: one prefill with a method that keeps everything and gathers what all of them need serves all.
        """
        policy = Policy.of(*levelled(resolve(method), keep), store=resolve_store(store))
        if any(getattr(policy.method, name, None) is not None for name in ("shortens", "among")):
            raise FewerError(
                f"{type(policy.method).__name__} skips parts of a prompt while it is read, so it cannot be tried on a "
                f"cache that was read already; make a cache with it"
            )
        other = Cache.within(self.shared.host, policy)
        mine = self.shared.members
        self._lend(other)
        theirs = other.shared.members
        for layer in theirs:
            layer.asked = ()
        for one, two in (
            [(mine, theirs)] if policy.together else [([a], [b]) for a, b in zip(mine, theirs, strict=True)]
        ):
            decide(one, two, "prefill")
        for source, target in zip(mine, theirs, strict=True):
            target.seconds += sum(source.watched.get(need, 0.0) for need in policy.method.needs)
        other.shared.frozen = True
        return other

    def _lend(self, other: "Cache") -> None:
        """All that it holds, and knows of its rows, to another cache: both go on separately."""
        layers, shared = self.layers, other.shared
        other._adopt([hf_surgery.fork(layer, shared) if isinstance(layer, Layer) else copy(layer) for layer in layers])
        shared.cutter = deepcopy(self.shared.cutter)

    def _adopt(self, layers: list[Any]) -> None:
        """Take these layers, made for this cache, in the place of its own."""
        self.layers = layers
        self.shared.members = [layer for layer in layers if isinstance(layer, Layer)]

    def fork(self) -> "Cache":
        """The same cache, frozen, to go on from twice: it shares what is held so far, and what it reads is its own."""
        other = Cache.within(self.shared.host, self.shared.policy)
        other.shared.frozen, other.shared.notes = True, list(self.shared.notes)
        self._lend(other)
        return other

    @staticmethod
    def stack(caches: "Sequence[Cache]") -> "Cache":
        """The rows of several caches of one length as one frozen batch, each row as its own method left it."""
        first = caches[0]
        if len({cache.get_seq_length() for cache in caches}) != 1:
            raise FewerError("stack: the caches have seen different numbers of tokens")
        for cache in caches:
            name = type(cache.shared.policy.method).__name__
            if getattr(cache.shared.policy.method, "reads", None) is not None:
                raise FewerError(f"stack: {name} reads part of what it holds, and rows of one batch are read alike")
            if cache.shared.cutter is not None or vlm_read.found(cache.shared.members[0]) is not None:
                raise FewerError("stack: a cache that knows which of its tokens are visual cannot share a batch")
        policy = Policy.of(resolve("full"), Budget.parse(1.0), "prefill", 1)
        both = Cache.within(first.shared.host, policy)
        both.shared.frozen = True
        layers: list[Any] = []
        for index, layer in enumerate(first.layers):
            column = [cache.layers[index] for cache in caches]
            if isinstance(layer, Layer):
                layers.append(hf_surgery.stack(column, both.shared))
            else:
                layers.append(one := copy(layer))
                one.keys = torch.cat([part.keys for part in column])
                one.values = torch.cat([part.values for part in column])
        both._adopt(layers)
        return both
