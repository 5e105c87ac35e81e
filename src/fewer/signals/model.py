"""What the model is made of, and what its layers say together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.signals.step import Observer, Rotary, Step


@dataclass(frozen=True)
class Rotation:
    """The model's rotary embedding itself, for methods that move keys to other positions."""

    key_bytes = 4  # a moved key knows both positions

    def start(self) -> "Observer":
        return _RotationObserver()


class _RotationObserver:
    lasting = False
    nbytes = 0

    def __init__(self) -> None:
        self.rotary: Rotary | None = None

    def observe(self, step: Step) -> None:
        self.rotary = step.rotary

    def value(self) -> Rotary | None:
        return self.rotary

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


@dataclass(frozen=True)
class OutputWeight:
    """A layer's output projection, cut into query heads."""

    weight: Float[Tensor, "heads e hidden"]


@dataclass(frozen=True)
class Projection:
    """The output projection of the layer, one matrix for each query head: what a value is worth once it is written."""

    key_bytes = 0

    def start(self) -> "Observer":
        return _ProjectionObserver()


class _ProjectionObserver:
    lasting = False
    nbytes = 0  # the model's own weights

    def __init__(self) -> None:
        self.output: Callable[[], Tensor | None] = lambda: None

    def observe(self, step: Step) -> None:
        self.output = step.output

    def value(self) -> "OutputWeight | None":
        weight = self.output()
        return None if weight is None else OutputWeight(weight)

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


@dataclass(frozen=True)
class LayerScores:
    """The scores `(b, h, n)` of every layer that is shortened, +inf for what must stay and -inf for padding."""

    scores: tuple[Tensor, ...]
    _won: dict[tuple[int, int], Tensor] = field(default_factory=dict, compare=False)
    _rows: dict[int, "LayerScores"] = field(default_factory=dict, compare=False)

    def row(self, row: int) -> "LayerScores":
        """Those of one row, as of a batch of one."""
        if row not in self._rows:
            self._rows[row] = LayerScores(tuple(layer[row : row + 1] for layer in self.scores))
        return self._rows[row]

    def winners(self, row: int, total: int) -> Int[Tensor, "layers h"]:
        """How many of the `total` best of this row, over all layers and heads, each head has. Ties go to earlier
        layers, lower heads and earlier tokens."""
        if (row, total) not in self._won:  # every layer asks
            flat = torch.cat([layer[row].flatten() for layer in self.scores])
            h = self.scores[0].shape[1]
            place = torch.cat([
                torch.arange(h, device=flat.device).repeat_interleave(layer.shape[2]) + index * h
                for index, layer in enumerate(self.scores)
            ])  # fmt: skip
            best = flat.argsort(descending=True, stable=True)[:total]
            self._won[row, total] = torch.bincount(place[best], minlength=len(self.scores) * h).view(-1, h)
        return self._won[row, total]


@dataclass(frozen=True)
class EveryLayer:
    """The scores of all layers, for methods that share one total among them."""

    key_bytes = 0
    everywhere: ClassVar[bool] = True

    def start(self) -> "Observer":
        return _EveryLayerObserver()


class _EveryLayerObserver:
    lasting = False
    nbytes = 0

    def observe(self, step: Step) -> None:
        pass

    def value(self) -> None:
        """The host puts the scores in when they are known."""

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass
