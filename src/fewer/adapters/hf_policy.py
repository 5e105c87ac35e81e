"""What the layers of one cache do, and when; and what they have in common."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast
from weakref import ref

import torch
from torch import Tensor

from fewer.adapters.hf_bind import Host
from fewer.codec import POSITION_BYTES, Codec, PairCodec, Stores, held_bytes
from fewer.inner import published
from fewer.types import Budget, FewerError, FewerWarning, Method, Phase, UnsupportedModel

if TYPE_CHECKING:
    from fewer.adapters.hf_layer import Layer
    from fewer.adapters.hf_passed import Cutter, Passed

When = Literal["prefill", "decode", "both"]


@dataclass(frozen=True)
class Policy:
    """What to do, and when. `stores` are the forms of storage, by the tier that a method's plan names."""

    method: Method
    budget: Budget
    when: When = "prefill"
    every: int = 64
    stores: Stores = (None,)
    cutter: "Callable[[], Cutter] | None" = None
    """Makes what decides between layers, for every cache."""

    @classmethod
    def of(
        cls, method: Method, budget: Budget, when: str | None = None, every: int | None = None, store: Any = None
    ) -> "Policy":
        """Check what a user asked for. What is left out is as the method was published, or else "prefill" and 64."""
        own = published(method)
        when, every = own[0] if when is None else when, own[1] if every is None else every
        if when not in ("prefill", "decode", "both"):
            raise FewerError(f"when={when!r}: compress at 'prefill', 'decode' or 'both'")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise FewerError(f"every={every!r}: a number of decoding steps, at least 1")
        name = type(method).__name__
        stores: Stores = getattr(method, "store", (None,))
        if store is not None:
            if stores != (None,) or getattr(method, "pairs", None) is not None:
                raise FewerError(f"store={store!r}: {name} brings its own storage; choose a method that has none")
            if getattr(method, "reads", None) is not None:
                raise FewerError(
                    f"store={store!r}: {name} reads chosen entries of a cache in full precision; leave it out"
                )
            stores = (cast(Codec, store),)
        if getattr(method, "whole", False) and not budget.whole:
            raise FewerError(
                f"keep={budget.keep!r}: {name} keeps every token and its own settings decide the bytes; pass "
                f"keep=1.0, and to drop tokens as well use it as the store of a method that does (store=...)"
            )
        if stores != (None,) and when != "prefill" and not getattr(method, "whole", False):
            raise FewerError(
                f"when={when!r} with packed storage: what was packed is never packed again, so a cache cannot be held "
                f"at a fixed size; compress at 'prefill'"
            )
        if any(getattr(need, "probe", False) for need in method.needs) and when != "prefill":
            raise FewerError(f"when={when!r}: {name} asks the model about its prompt, which only 'prefill' has")
        return cls(method, budget, cast(When, when), every, stores)

    def covers(self, phase: str) -> bool:
        return self.when in (phase, "both")

    @property
    def packs(self) -> bool:
        """Whether anything is stored in fewer bits."""
        return any(store is not None for store in self.stores)

    @property
    def pairs(self) -> PairCodec | None:
        """How layers are held two by two, where the method does that."""
        return getattr(self.method, "pairs", None)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do, ever: all is kept, and as it is."""
        shortens = getattr(self.method, "shortens", None) is not None  # later layers then hold tokens with gaps
        return self.budget.whole and not self.packs and self.pairs is None and not shortens and self.cutter is None

    @property
    def together(self) -> bool:
        """Whether layers are compressed at the end of a forward, when the scores of all are known."""
        everywhere = any(getattr(need, "everywhere", False) for need in self.method.needs)
        return everywhere or self.probes or self.pairs is not None

    @property
    def probes(self) -> bool:
        """Whether the model must be run once more before anything is dropped."""
        return any(getattr(need, "probe", False) for need in self.method.needs)

    def bytes_for(self, tokens: int, d: int, e: int, itemsize: int) -> int:
        """Most bytes that one head's tokens take, with all metadata: a block is short of one token, and waits."""
        entry, held = (d + e) * itemsize, 0
        for store in self.stores:
            block = 1 if store is None else store.block
            blocks, waiting = -(-tokens // block) * block, min(tokens, block - 1)
            packed = blocks * entry if store is None else store.bytes_for(blocks, d, e, itemsize)
            held = max(held, packed + waiting * entry)
        return int(held + tokens * (POSITION_BYTES + self.key_bytes))

    @property
    def key_bytes(self) -> int:
        """Bytes of the signals that live on with each key."""
        return sum(need.key_bytes for need in self.method.needs)

    def fill(
        self, budget: Budget, counts: Callable[[Budget], Sequence[int]], most: int, d: int, e: int, itemsize: int,
        *, places: int, packed: Sequence[int] = (), beside: int = 0,
    ) -> Budget:  # fmt: skip
        """More tokens a head than `budget`, which bytes were turned into as if all but one token of a block waited
        unpacked in every head, where what is really packed leaves room for them. At most `most`.

        Args:
            counts: what some of the `places` heads that share the bytes would hold. Their part of the bytes is by what
                they hold under `budget`, packed and with a block that waits; so all parts make one whole, and nobody
                who gets no more than that takes more than its part.
            packed: what those hold in blocks already; more blocks are packed by themselves.
            beside: bytes that are held whatever stays.
        """
        store, size = self.stores[0], self.budget.size
        if size is None or len(self.stores) > 1 or store is None or store.block == 1:
            return budget
        certain, block, entry = budget.tokens or 0, store.block, (d + e) * itemsize
        if certain >= most:
            return budget
        token = store.bytes_for(block, d, e, itemsize) / block + POSITION_BYTES + self.key_bytes
        part = sum(count * token + (block - 1) * entry for count in counts(budget))
        part *= (size - beside) / (places * (certain * token + (block - 1) * entry))
        again = 2 * store.bytes_for(block, d, e, itemsize) - store.bytes_for(2 * block, d, e, itemsize)

        def fits(tokens: int) -> bool:
            held = counts(replace(budget, tokens=tokens))
            wide = [max(held) + block - 1] * len(held) if len(set(held)) > 1 else held  # as signals are held
            taken = sum(held_bytes(store, count, d, e, itemsize) + count * POSITION_BYTES for count in held)
            runs = sum(0 < had < count // block * block for had, count in zip(packed, held, strict=False))
            return bool(taken + again * runs + sum(wide) * self.key_bytes <= part)

        if fits(most):
            return replace(budget, tokens=most)
        blocks = _last(lambda n: fits(n * block), certain // block, most // block)
        least = max(certain, blocks * block)
        return replace(budget, tokens=_last(fits, least, min((blocks + 1) * block - 1, most)))


def _last(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from `low`, which is taken to fit, to `high` that does, where those that do come first; else some
    number that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


@dataclass
class Shared:
    """What the layers of one cache have in common."""

    host: Host
    policy: Policy
    layers: int
    frozen: bool = False
    recording: Literal["prompt", "answer"] | None = None
    """What the next forward of assisted decoding brings, guesses included, of which the wrong ones will be cropped."""
    notes: list[str] = field(default_factory=list)
    probing: Any = None
    """The need on whose behalf the model is being run once more; nothing is stored then."""
    held: int = 0
    """Bytes that all layers hold now."""
    peak: int = 0
    """Most bytes that all layers held at once."""
    transient: int = 0
    """Most bytes that a layer unpacked at once in a decoding step."""
    step_seconds: float = 0.0
    """What the latest decoding step took, from the first layer's update to the last layer's attention."""
    started: float = 0.0
    passed: "Passed | None" = None
    """Which tokens of the forward under way go on to later layers, where some do not."""
    cutter: "Cutter | None" = None
    """Who decides between layers, in a vision-language model, which tokens go on."""
    witness: tuple[Any, ...] | None = None
    """What the attention of the layer before the next cut was given."""
    chosen: Tensor | None = None
    """The columns that each query head chose to read in the decoding step under way."""
    _members: "tuple[ref[Layer], ...]" = ()
    _mask: Any = None
    _padding: Tensor | None = None

    @property
    def members(self) -> "list[Layer]":
        """The cache's own layers that compress. They are only pointed at: in a cycle, what a cache holds would be freed
        when Python next looks for cycles, and not when nobody uses the cache any more."""
        return [layer for layer in (member() for member in self._members) if layer is not None]

    @members.setter
    def members(self, layers: "Sequence[Layer]") -> None:
        self._members = tuple(map(ref, layers))

    def note(self, text: str) -> None:
        """A remark that the user must hear of once, and that the report repeats."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, FewerWarning, stacklevel=2)

    def forget(self) -> None:
        """The forward is over; hold nothing of its mask and its positions."""
        self._mask = self._padding = self.chosen = None
        self.host.hidden.clear()
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
            padding = (~last if last.dtype == torch.bool else last < 0).expand(b, q)
            self._mask, self._padding = ref(mask), padding if bool(padding.any()) else None
        return self._padding

    def phase(self, q: int, length: int) -> Phase:
        """A forward of more than one token is a prefill: a prompt, a turn, a chunk."""
        return "prefill" if q > 1 or length == 0 else "decode"
