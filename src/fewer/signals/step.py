"""What a host shows while the model runs, and what watches it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_CELLS = 1 << 20
"""Numbers held at once where blocks are read: few enough that a CPU's cache holds them."""


def blank(x: Float[Tensor, "b h n d"], padding: Bool[Tensor, "b #h n"]) -> Float[Tensor, "b h n d"]:
    """Zeros for padding, whose features may be no numbers at all; `x` itself where there is none."""
    return x.masked_fill(padding.unsqueeze(-1), 0) if bool(padding.any()) else x


def marked_last(marked: Bool[Tensor, "*lead n"]) -> Int[Tensor, "*lead n"]:
    """The order in which the marked columns come last; those alike keep theirs.

    >>> marked_last(torch.tensor([True, False, True, False])).tolist()
    [1, 3, 0, 2]
    """
    return marked.to(torch.int8).argsort(dim=-1, stable=True)


@runtime_checkable
class Rotary(Protocol):
    """A model's rotary position embedding, as the host's adapter found it."""

    def turn(self, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Rotate features `(b, h, n, d)` by positions `(b, n)` or `(b, h, n)`, or back by them. Lengths are kept."""
        ...

    def mean_matrix(self, positions: Tensor) -> Tensor:
        """The `(d, d)` mean of the rotations at `positions` `(p,)`, as the model applies them to queries."""
        ...


@dataclass(frozen=True)
class Step:
    """One forward at one layer, as the host shows it to observers.

    `dense` gives all keys of the layer, kept and new, as `(keys, positions, padding)`; it is a function because few
    needs ask for them, and they may have to be unpacked. Queries are rotated; `scaling` is the factor on the logits,
    `softcap` the model's tanh cap. `place` counts the layers that are shortened. `hidden` is there where a need asks
    for it; `output` gives the output projection, cut into query heads, where the model has one that can be found.
    """

    query: Float[Tensor, "b heads q d"]
    positions: Int[Tensor, "b q"]
    padding: Bool[Tensor, "b q"]
    dense: Callable[[], tuple[Tensor, Tensor, Tensor]]
    scaling: float
    softcap: float | None
    rotary: Rotary | None
    place: int = 0
    hidden: Float[Tensor, "b q hidden"] | None = None
    output: Callable[[], Tensor | None] = lambda: None


@runtime_checkable
class Observer(Protocol):
    lasting: bool
    """Whether the signal lives on with the keys when the cache was compressed, or starts anew."""

    def observe(self, step: Step) -> None: ...

    def value(self) -> object:
        """The signal, aligned with the layer's keys where it is a number for each key."""
        ...

    def regather(self, index: Int[Tensor, "b h k"]) -> None:
        """The layer's keys were reordered or dropped: entry i now is what `index[i]` was (-1: none)."""
        ...

    def rows(self, index: Int[Tensor, " r"]) -> None:
        """The batch rows were reordered or repeated."""
        ...

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Probing(Protocol):
    """A need that has the model read something more before its cache is cut, and looks at the attention."""

    probe: ClassVar[bool]

    def inputs(self, ids: Int[Tensor, "b q"], real: Bool[Tensor, "b q"]) -> Iterable[tuple[Tensor, Tensor]]:
        """What to read, given the tokens of the forward that just ended and which of them are no padding: token ids
        `(b, p)` and which of those are real. Each item is one forward right after the prompt; nothing of it is kept."""
        ...
