"""What a vision tower attends to, read row by row while it runs, under any of its attention functions.

    config._attn_implementation = "fewer_tower_sdpa"    while a method that asks for it is in use, and back afterwards
    that function                                       the tower's own, which also looks at the queries and keys of the
                                                        layers that are watched

The class token's row is computed from those, and no more; what all patches receive takes a map a head, one at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fewer.adapters.hf_bind import BACKENDS, backend_of
from fewer.signals.visual import Layout, Tower, TowerView
from fewer.types import MissingSignal, UnsupportedModel

NAMES = ("vision_tower", "visual", "vision_model")
"""What models call their vision tower."""
_watched: dict[int, list[tuple[Tensor, Tensor]]] = {}
"""Id of an attention module -> queries and keys `(1, heads, n, d)` of every image it saw, where somebody watches it."""


def tower_of(base: nn.Module) -> nn.Module:
    """A vision-language model's vision tower."""
    found: list[nn.Module] = [m for name in NAMES if isinstance(m := getattr(base, name, None), nn.Module)]
    if not found:
        raise UnsupportedModel(f"{type(base).__name__} has no vision tower under the names {', '.join(NAMES)}")
    return found[0]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, backend: str, **kw: Any
) -> Any:
    if (seen := _watched.get(id(module))) is not None:
        seen.extend((query[i : i + 1], key[i : i + 1]) for i in range(len(query)))
    return backend_of(backend, module)(module, query, key, value, *args, **kw)


class Watch:
    """The layers of one tower that methods read, for as long as they are in use."""

    def __init__(self, base: Any, needs: frozenset[Tower]) -> None:
        self.base, self.tower = base, tower_of(base)
        self.blocks = _blocks(self.tower)
        self.layers = {need: self._layers(need) for need in needs}
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for layers in self.layers.values() for i in layers}

    def _layer(self, need: Tower) -> int:
        depth, layer = len(self.blocks), need.layer
        if layer is None:
            features = getattr(self.base.config, "vision_feature_layer", None)
            features = features[-1] if isinstance(features, (list, tuple)) else features
            layer = depth - 1 if features is None else features - 1 if features >= 0 else depth + features
        layer = layer + depth if layer < 0 else layer
        if not 0 <= layer < depth:
            raise MissingSignal(f"layer={need.layer!r}: this vision tower has {depth} layers")
        return layer

    def _layers(self, need: Tower) -> list[int]:
        """All that it reads, in their order."""
        last = self._layer(need)
        first = last if need.since is None else int(need.since * len(self.blocks))
        if first > last:
            raise MissingSignal(
                f"since={need.since!r}: of {len(self.blocks)} layers that is layer {first}, and features come of {last}"
            )
        return list(range(first, last + 1))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Look on while the tower runs; leaving puts everything back."""
        found: list[Any] = [getattr(m, "config", None) for m in self.tower.modules()]
        configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
        before = {key: config._attn_implementation for key, config in configs.items()}
        for backend in set(before.values()):
            if backend not in BACKENDS:
                raise UnsupportedModel(
                    f"the vision tower runs attention by {backend!r}, which cannot be looked at; load the model with "
                    "attn_implementation={'vision_config': 'sdpa'} (or 'eager')"
                )
            AttentionInterface.register(f"fewer_tower_{backend}", partial(_attention, backend=backend))
            AttentionMaskInterface.register(f"fewer_tower_{backend}", ALL_MASK_ATTENTION_FUNCTIONS[backend])
        modules = {
            layer: [id(m) for m in self.blocks[layer].modules() if m is not self.blocks[layer]] for layer in self.seen
        }
        try:
            for key, config in configs.items():
                config._attn_implementation = f"fewer_tower_{before[key]}"
            for layer, ids in modules.items():
                _watched.update(dict.fromkeys(ids, self.seen[layer]))
            yield
        finally:
            for key, config in configs.items():
                config._attn_implementation = before[key]
            for ids in modules.values():
                for one in ids:
                    _watched.pop(one, None)

    def begin(self) -> None:
        """Before the tower runs."""
        for seen in self.seen.values():
            seen.clear()

    def views(self, layouts: list[Layout], crops: list[int], order: Tensor | None) -> list[dict[Tower, TowerView]]:
        """After it ran: what each piece's tokens are to every need. `crops` are the images of the tower that each piece
        was made of; `order` is where the tower left each group of patches, if not in their order."""
        views: list[dict[Tower, TowerView]] = [{} for _ in layouts]
        for need, layers in self.layers.items():
            several = [self._views(need, layer, layouts, crops, order) for layer in layers]
            for mine, alike in zip(views, zip(*several, strict=True), strict=True):
                mine[need] = TowerView.mean(list(alike))
        return views

    def _views(
        self, need: Tower, layer: int, layouts: list[Layout], crops: list[int], order: Tensor | None
    ) -> list[TowerView]:
        """The same of one layer."""
        seen, views, first = self.seen[layer], [], 0
        if order is not None:
            seen = _reordered(seen, order)
        if len(seen) != sum(crops):
            raise MissingSignal(
                f"layer {layer} of the vision tower attended in {len(seen)} pieces to {sum(crops)} images: name a "
                "layer that attends to whole images"
            )
        for layout, count in zip(layouts, crops, strict=True):
            parts = [
                _view(need, q, k, grid, order is not None or self._grouped)
                for (q, k), grid in zip(seen[first : first + count], layout.grids, strict=True)
            ]
            views.append(TowerView.join(parts).take(layout.cell))
            first += count
        return views

    @property
    def _grouped(self) -> bool:
        """Whether the patches that make one token stand next to each other in the tower."""
        return hasattr(self.tower, "spatial_merge_size")


def _blocks(tower: nn.Module) -> nn.ModuleList:
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    if not lists:
        raise UnsupportedModel(f"{type(tower).__name__} has no list of blocks to watch")
    return max(lists, key=len)


def _reordered(seen: list[tuple[Tensor, Tensor]], order: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Undo the order in which windows left groups of four patches."""
    query, key = (torch.cat(part, 2) for part in zip(*seen, strict=True))
    sizes, back = [q.shape[2] for q, _ in seen], order.argsort()
    group = query.shape[2] // len(order)

    def undone(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, group, x.shape[3])[:, :, back].flatten(2, 3)

    return list(zip(torch.split(undone(query), sizes, 2), torch.split(undone(key), sizes, 2), strict=True))


MOST_BEFORE = 16
"""Class and register tokens that a tower may have before its patches."""


def _patches(n: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches, of a tower's n tokens, that were pooled to this grid."""
    h, w = grid
    tries = [(fold * h, fold * w) for fold in range(1, 9)] + [(2 * h - 1, 2 * w - 1)]
    fits = {n - r * c: (r, c) for r, c in tries if 0 <= n - r * c <= MOST_BEFORE}
    if not fits:
        raise UnsupportedModel(f"the vision tower has {n} tokens, of which a grid of {h} by {w} cannot be told")
    return fits[min(fits)]


@torch.no_grad()
def _view(need: Tower, query: Tensor, key: Tensor, grid: tuple[int, int], grouped: bool) -> TowerView:
    """One image of the tower: `query`, `key` `(1, heads, n, d)`, to `grid` rows and columns of tokens."""
    query, key = query[0].float(), key[0].float()
    n, scaling = query.shape[1], query.shape[-1] ** -0.5
    rows, columns = (n, 1) if grouped else _patches(n, grid)
    prefix = n - rows * columns
    if need.by == "class":
        if prefix == 0:
            raise MissingSignal(
                "this vision tower has no class token; choose whose attention counts: by='received', the mean over all "
                "patches"
            )
        logits = (query[:, :1] @ key.mT * scaling)[:, 0]
        attention = logits.softmax(-1)
    else:
        logits = (query[:, prefix:].mean(1, keepdim=True) @ key.mT * scaling)[:, 0]
        attention = torch.stack([(q @ k.mT * scaling).softmax(-1).mean(0) for q, k in zip(query, key, strict=True)])

    def tokens(x: Tensor) -> Tensor:  # (c, patches) -> (c, h * w)
        if grouped:
            return x.view(len(x), grid[0] * grid[1], -1).mean(2)
        return F.adaptive_avg_pool2d(x.view(len(x), rows, columns), grid).flatten(1)

    keys = key[:, prefix:]
    heads, _, d = keys.shape
    folded = tokens(keys.transpose(1, 2).reshape(heads * d, -1)).view(heads, d, -1).transpose(1, 2)
    return TowerView(tokens(attention[:, prefix:]), tokens(logits[:, prefix:]), folded)
