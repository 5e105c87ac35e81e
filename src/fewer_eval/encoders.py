"""Methods on the default vision model, on real pictures: what is lost when fewer tokens pass.

    stamps      1 nearest neighbour among labelled pictures, by the class token after the eleventh block; each picture
                is looked up among all others, which went through the same method
    fashion     a linear probe on the same features, fitted to the unreduced model's, read on the reduced one's
    saliency    a dense map from the tokens that were put back, beside the map of the unreduced model: correlation

Features are of the eleventh block because the last one of this model was tuned for saliency.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewer
from fewer.types import FewerError, Method

FEATURES_AT = 11
"""Blocks that features for classification pass."""


@dataclass(frozen=True)
class Score:
    """One method at one keep on one task. `quality` is the task's measure, `flops` the blocks' share in closed form;
    `error` is the mean absolute error of a dense map, in its own unit."""

    task: str
    method: str
    keep: float
    flops: float
    quality: float
    n: int
    size: int
    restore: str | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def truncated(model: Any, blocks: int) -> Any:
    """The same encoder, its weights shared, without the blocks after `blocks` and without the last norm."""
    short = copy(model)
    short._modules = dict(model._modules)
    short.encoder = copy(model.encoder)
    short.encoder._modules = dict(model.encoder._modules)
    short.encoder.layer = nn.ModuleList(list(model.encoder.layer)[:blocks])
    short.layernorm = nn.Identity()
    return short


def batches(pixels: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]


def shortened(model: Any, method: str | Method, keep: float, restore: str | None = None) -> AbstractContextManager[Any]:
    """The encoder under this method; as it is, for "full"."""
    return nullcontext() if method == "full" else fewer.compress(model, method, keep, restore=restore)


@torch.inference_mode()
def class_tokens(
    model: Any, method: str | Method, keep: float, pixels: Tensor, *, batch: int = 16
) -> tuple[Tensor, float]:
    """The class token of each picture `(n, d)`, and the share of FLOPs that it took."""
    found, flops = [], []
    with shortened(model, method, keep) as run:
        for some in batches(pixels, batch):
            found.append(model(pixel_values=some).last_hidden_state[:, 0])
            flops.append(1.0 if run is None else run.flops)
    return torch.cat(found), fmean(flops)


def nearest_neighbour(features: Tensor, labels: Sequence[int]) -> float:
    """The share of pictures whose nearest other one, by cosine, has their label."""
    if len(features) < 2:
        raise FewerError("one picture has no neighbours")
    unit = F.normalize(features, dim=-1)
    alike = unit @ unit.T
    alike.fill_diagonal_(-torch.inf)
    truth = torch.tensor(labels)
    return float((truth[alike.argmax(-1)] == truth).float().mean())


@dataclass(frozen=True)
class Probe:
    """A linear classifier: ridge regression onto one-hot labels, on standardised features."""

    weight: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, ridge: float = 10.0) -> "Probe":
        x, mean, spread = features.double(), features.double().mean(0), features.double().std(0).clamp(min=1e-6)
        x = F.pad((x - mean) / spread, (0, 1), value=1.0)
        y = F.one_hot(labels.long()).double()
        return cls(torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y), mean, spread)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        x = F.pad((features.double() - self.mean) / self.spread, (0, 1), value=1.0)
        return float(((x @ self.weight).argmax(-1) == labels.long()).float().mean())


@torch.inference_mode()
def maps(
    model: Any,
    head: Callable[[Tensor, tuple[int, int]], Tensor],
    method: str | Method,
    keep: float,
    pixels: Tensor,
    *,
    restore: str = "copy",
    batch: int = 8,
) -> tuple[Tensor, float]:
    """Dense maps `(n, pixels)` from restored tokens, and the share of FLOPs.

    Args:
        head: gives a map `(b, y, x)` of all tokens, and the height and width of the pictures.
    """
    found, flops = [], []
    size = (pixels.shape[-2], pixels.shape[-1])
    with shortened(model, method, keep, restore) as run:
        for some in batches(pixels, batch):
            found.append(head(model(pixel_values=some).last_hidden_state, size).flatten(1))
            flops.append(1.0 if run is None else run.flops)
    return torch.cat(found), fmean(flops)


def agreement(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean correlation over pictures, and mean absolute error, of maps `(n, pixels)`."""
    a, b = (x - x.mean(-1, keepdim=True) for x in (found, reference))
    both = a.norm(dim=-1) * b.norm(dim=-1)
    if bool((both == 0).any()):
        raise FewerError("a map is the same everywhere, so it correlates with nothing")
    return float(((a * b).sum(-1) / both).mean()), float((found - reference).abs().mean())


@torch.inference_mode()
def text_vectors(
    model: Any, tokenizer: Any, method: str | Method, keep: float, texts: Sequence[str], *, batch: int = 16
) -> tuple[Tensor, float]:
    """A vector of length one for each text `(n, d)`, the mean of its tokens, each counted as all it stands for; and the
    share of FLOPs."""
    found, flops = [], []
    with shortened(model, method, keep) as run:
        for start in range(0, len(texts), batch):
            given = tokenizer(texts[start : start + batch], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**given).last_hidden_state
            counts = given["attention_mask"] if run is None else run.mass
            found.append((hidden * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True))
            flops.append(1.0 if run is None else run.flops)
    return F.normalize(torch.cat(found), dim=-1), fmean(flops)


def same_neighbour(found: Tensor, reference: Tensor) -> float:
    """The share of texts whose nearest other one is the one it was."""
    nearest = [(x @ x.T).fill_diagonal_(-torch.inf).argmax(-1) for x in (found, reference)]
    return float((nearest[0] == nearest[1]).float().mean())
