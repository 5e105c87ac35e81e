"""Which tokens of a forward go on to later layers, and everything that layers are given, cut down to those."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fewer.types import UnsupportedModel

if TYPE_CHECKING:
    from fewer.adapters.hf_cache import Cache


@dataclass
class Passed:
    """Which tokens of a forward go on. Rows are aligned at their end; -1 fills up those that have fewer.

    `columns` are the forward's, of which there are `total`; `ranks` count a row's new tokens from 0, and `new` is how
    many it has, those included that stay behind. `moved` gives the tokens that go on other positions than they had:
    what layers are given for each token, by name.
    """

    columns: Tensor  # (b, k)
    ranks: Tensor  # (b, k)
    total: int
    new: list[int]
    moved: dict[str, Any] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    """Layers that were given them: several caches may have hooks on one model."""
    whole: bool = True
    """Whether the hidden states on their way are those of all tokens still."""
    _cut: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def padding(self) -> Tensor:
        return self.columns < 0

    def once(self, key: Any, thing: Any, cut: Callable[[], Any]) -> Any:
        """What `cut` gives, worked out once a forward: layers share their masks and tables."""
        if key not in self._cut:
            self._cut[key] = thing, cut()  # holding on to the thing keeps its id its own
        return self._cut[key][1]

    def of(self, thing: Any) -> Any:
        """The entries of the tokens that go on, in every tensor `(b or 1, total, ..)`; others as they are."""
        if isinstance(thing, dict):
            return {key: self.of(part) for key, part in thing.items()}
        if type(thing) in (tuple, list):
            return type(thing)(self.of(part) for part in thing)
        b, k = self.columns.shape
        rows = ((1, self.total), (b, self.total))
        if isinstance(thing, Tensor) and thing.ndim == 4 and len(thing) == 3 and thing.shape[1:3] in rows:
            return torch.stack([self.of(axis) for axis in thing])  # tables of time, rows and columns, up to 5.2
        if not isinstance(thing, Tensor) or thing.shape[:2] not in rows:
            return thing
        at = self.columns.clamp(min=0).view(b, k, *[1] * (thing.ndim - 2))
        return thing.expand(b, *thing.shape[1:]).gather(1, at.expand(b, k, *thing.shape[2:]))

    def mask(self, mask: Tensor | None, before: int, dtype: torch.dtype) -> Tensor | None:
        """The mask for `before` columns that a layer holds and for those that go on, seen by those that go on."""
        (b, k), q, filler = self.columns.shape, self.total, self.padding
        if mask is None:
            if not before and not bool(filler.any()):
                return None  # causal, and in order
            shape = (1, 1, q, before + q)
            mask = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=filler.device).triu(before + 1)
        if mask.ndim != 4:
            raise UnsupportedModel(f"the attention mask has shape {tuple(mask.shape)}, not (batch, heads, q, kv)")
        shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        mask = mask[..., -(before + q) :].expand(b, -1, -1, -1)
        at = self.columns.clamp(min=0)[:, None]  # (b, 1, k)
        rows = mask.gather(2, at.unsqueeze(3).expand(b, mask.shape[1], k, before + q))
        old, new = rows[..., :before], rows[..., before:]
        new = new.gather(3, at.unsqueeze(2).expand(b, mask.shape[1], k, k))
        itself = torch.eye(k, dtype=torch.bool, device=mask.device)
        fills = filler[:, None, None]  # seen by nothing but itself: a row that sees nothing could give no number
        return torch.cat([old, new.masked_fill(fills & ~itself, hidden).masked_fill(fills & itself, shown)], dim=3)

    def spread(self, x: Tensor, fill: float = torch.nan) -> Tensor:
        """Features `(b, h, k, d)` back in the forward's columns `(b, h, total, d)`, `fill` in all others."""
        at = torch.where(self.padding, self.total, self.columns)[:, None, :, None]
        out = x.new_full((*x.shape[:2], self.total + 1, x.shape[3]), fill)  # what fills up rows lands in a spare column
        return out.scatter(2, at.expand_as(x), x)[:, :, : self.total]


class Cutter(Protocol):
    """Decides between layers which tokens go on; `cache.shared.cutter`."""

    @property
    def after(self) -> frozenset[int]:
        """The layers after which it decides, -1 for before the first."""
        ...

    def cut(self, after: int, given: dict[str, Any], cache: "Cache") -> tuple[Passed, Tensor] | None:
        """Who goes on, and their hidden states `(b, k, d)`, given what the next layer would be; None for all."""
        ...

    def entries(self, positions: Tensor) -> Any:
        """The signal `VisualEntries` for a layer's entries at these positions of their rows."""
        ...

    def choose(self, rows: Tensor) -> None:
        """The cache holds these rows from now on."""
        ...
