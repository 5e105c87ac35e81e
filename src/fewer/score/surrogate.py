"""Scores that a small head predicts from the hidden states a layer's attention is given, instead of working them out.

fit_heads(hidden, scores, ...) -> tensors      once, for a model: one head for each layer, linear or with one
                                               hidden layer, whichever predicts held-out tokens better
Predicted(fit)                                 a need: the prediction for each key, made when the key is read
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fewer.fit import Fit
from fewer.signals import Observer, PerKey, Step

CEILING = -1e-6
"""Predictions are logarithms of shares and stay below this; 0 is what keys have that were never rated."""


@dataclass(frozen=True)
class Hidden:
    """The hidden states of the last forward, for those who fit heads."""

    key_bytes: ClassVar[int] = 0
    hidden: ClassVar[bool] = True

    def start(self) -> Observer:
        return _HiddenObserver()


class HiddenStates(NamedTuple):
    states: Float[Tensor, "b q hidden"]


class _HiddenObserver:
    lasting = False

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def observe(self, step: Step) -> None:
        self.states = step.hidden

    def value(self) -> HiddenStates | None:
        return None if self.states is None else HiddenStates(self.states)

    def regather(self, index: Tensor) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        self.states = None if self.states is None else self.states[index]

    @property
    def nbytes(self) -> int:
        return 0 if self.states is None else self.states.nbytes


@dataclass(frozen=True)
class Predicted:
    """What the heads of `fit` predict for each key; 0 for keys that were read while nothing was observed."""

    fit: Fit | None

    key_bytes: ClassVar[int] = 4  # float32, for as long as the key is kept
    hidden: ClassVar[bool] = True

    def start(self) -> Observer:
        assert self.fit is not None, "hosts refuse a need without its fit before they run"
        return _PredictedObserver(self.fit.tensors)


class _PredictedObserver(PerKey):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.head: dict[str, Tensor] = {}  # the layer's own, once it is known which layer that is
        self.last: Tensor | None = None  # (b,) position of each row's last token that was rated

    def observe(self, step: Step) -> None:
        assert step.hidden is not None, "the host gives hidden states to needs that ask for them"
        if not self.head:
            self.head = {name: tensor[step.place].to(step.hidden.device) for name, tensor in self.tensors.items()}
        new = predict(self.head, step.hidden.float()).clamp(max=CEILING).transpose(1, 2)  # (b, h, q)
        old, end = self.value(), torch.where(step.padding, -1, step.positions).amax(1)
        start = torch.where(step.padding, torch.iinfo(torch.long).max, step.positions).amin(1)
        width = 0 if old is None else old.shape[-1]
        follows = bool((start == (0 if self.last is None else self.last + 1)).all())
        # keys may have come in between that nobody showed to observers; only then is it worth asking how many
        n = width + new.shape[-1] if follows else step.dense()[1].shape[-1]
        numbers = new.new_zeros(*new.shape[:2], n)
        if old is not None:
            numbers[..., :width] = old
        numbers[..., n - new.shape[-1] :] = new
        self.put(numbers)
        self.last = end if self.last is None else torch.maximum(end, self.last)

    def rows(self, index: Tensor) -> None:
        super().rows(index)
        self.last = None if self.last is None else self.last[index]


def predict(head: Mapping[str, Tensor], hidden: Float[Tensor, "*lead n hidden"]) -> Float[Tensor, "*lead n h"]:
    """What a head says; heads of several layers are predicted at once where both have a leading axis for them."""
    if "inner" in head:
        hidden = F.gelu(hidden @ head["inner"].mT + head["inner_bias"].unsqueeze(-2))
    return hidden @ head["weight"].mT + head["bias"].unsqueeze(-2)


def explained(predicted: Float[Tensor, "l n h"], true: Float[Tensor, "l n h"]) -> Float[Tensor, " l"]:
    """R2 of each layer: the share of the variance of its key-value heads that is explained."""
    spread = (true - true.mean(1, keepdim=True)).square().sum((1, 2))
    return 1 - (true - predicted).square().sum((1, 2)) / spread.clamp(min=1e-12)


def fit_heads(
    hidden: Float[Tensor, "l n hidden"],
    scores: Float[Tensor, "l n h"],
    held_out: int,
    *,
    seed: int,
    width: int = 128,
    epochs: int = 15,
    tick: Callable[[float], None] = lambda share: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The better heads on held-out tokens, and R2 of each layer there for "linear" and "mlp".

    Args:
        hidden, scores: pairs to learn from, layer by layer.
        held_out: how many of the last of the n are only measured on.
        width: hidden features of the MLP.
        tick: called with the share that is done.
    """
    n = hidden.shape[1] - held_out
    x, y = hidden[:, :n], scores[:, :n]
    heads = {"linear": ridge(x, y), "mlp": train(x, y, seed=seed, width=width, epochs=epochs, tick=tick)}
    r2 = {name: explained(predict(head, hidden[:, n:]), scores[:, n:]) for name, head in heads.items()}
    return heads[max(r2, key=lambda name: float(r2[name].mean()))], r2


def ridge(x: Float[Tensor, "l n hidden"], y: Float[Tensor, "l n h"], strength: float = 0.1) -> dict[str, Tensor]:
    """Linear heads in closed form; `strength` is the penalty on standardised features, for each sample."""
    mean, spread, middle = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-6), y.mean(1, keepdim=True)
    weights = []
    for layer in range(len(x)):  # one at a time: all of them in float64 would be many times the model's own memory
        z = ((x[layer] - mean[layer]) / spread[layer]).double()
        gram = z.T @ z + strength * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        weights.append(torch.linalg.solve(gram, z.T @ (y[layer] - middle[layer]).double()).T)
    weight = torch.stack(weights).float() / spread
    return {"weight": weight, "bias": middle.squeeze(1) - (weight @ mean.mT).squeeze(-1)}


def train(
    x: Float[Tensor, "l n hidden"],
    y: Float[Tensor, "l n h"],
    *,
    seed: int,
    width: int,
    epochs: int,
    batch: int = 512,
    rate: float = 5e-3,
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, Tensor]:
    """Heads with one hidden layer, all layers' at once: AdamW on the squared error, the rate falling as a cosine."""
    layers, n, size = x.shape
    mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-6)
    middle, scale = y.mean(1, keepdim=True), y.std((1, 2), keepdim=True).clamp(min=1e-6)
    draw = torch.Generator().manual_seed(seed)
    shapes = {"inner": (width, size), "inner_bias": (width,), "weight": (y.shape[2], width), "bias": (y.shape[2],)}
    head = {
        name: torch.randn(layers, *shape, generator=draw) * (shape[1] ** -0.5 if len(shape) == 2 else 0.0)
        for name, shape in shapes.items()
    }
    steps = epochs * max(1, n // batch)
    with torch.enable_grad():
        head = {name: tensor.to(x.device).requires_grad_() for name, tensor in head.items()}
        descent = torch.optim.AdamW(head.values(), lr=rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(descent, steps)
        for step in range(steps):
            at = torch.randint(n, (min(batch, n),), generator=draw).to(x.device)
            error = predict(head, (x[:, at] - mean) / spread) - (y[:, at] - middle) / scale
            loss = error.square().mean((1, 2)).sum()  # of all layers: none of them knows of the others
            descent.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(head.values(), float(layers))
            descent.step()
            falling.step()
            tick((step + 1) / steps)
    with torch.no_grad():  # heads of plain hidden states and scores
        inner, outer = head["inner"] / spread, head["weight"] * scale
        return {
            "inner": inner,
            "inner_bias": head["inner_bias"] - (inner @ mean.mT).squeeze(-1),
            "weight": outer,
            "bias": head["bias"] * scale.squeeze(-1) + middle.squeeze(1),
        }
