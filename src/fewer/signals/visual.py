"""What a vision-language model can tell of its visual tokens, beside the states that its language model reads.

    Places()                where each token lies: crop or frame, row, column   -> Layout
    Tower(by="class")       what the vision tower attends to                    -> TowerView
    Question()              the states of the text that asks                    -> Tensor (1, t, d)
    TextAttention()         who the text looks at, in the layer before a cut    -> Looked
    Vocabulary()            the language model's input embeddings               -> Tensor (words, d)

A method sees the visual tokens of one picture (or of all of a prompt), in the order of the prompt. The host hands these
things over when it asks the method, and gathers none that no method needs.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.errors import FewerError, MissingSignal


class _Visual:
    """A need that only a vision-language model's host can meet."""

    key_bytes: ClassVar[int] = 0

    def start(self) -> Any:
        raise MissingSignal(
            f"this method reads {type(self).__name__}, which only a vision-language model has: "
            "`fewer methods --family kv` lists the methods for plain decoders"
        )


@dataclass(frozen=True)
class Places(_Visual):
    """Where each visual token lies."""


@dataclass(frozen=True)
class Layout:
    """Where each of n visual tokens lies: in which picture, in which crop or frame of it, in which row and column.

    `grids` are the rows and columns of every crop (or frame) of every picture; `crop` counts through all of them.
    `whole` are the crops that show a whole picture. `regions` say where crops lie in their picture, as (top, left,
    bottom, right) in shares of it, None where the model does not say. `video` tells frames, in their order, from crops.
    """

    picture: Int[Tensor, " n"]
    crop: Int[Tensor, " n"]
    y: Int[Tensor, " n"]
    x: Int[Tensor, " n"]
    grids: tuple[tuple[int, int], ...]
    whole: tuple[int, ...] = ()
    regions: Float[Tensor, "crops 4"] | None = None
    video: bool = False

    def __len__(self) -> int:
        return len(self.crop)

    @property
    def cell(self) -> Int[Tensor, " n"]:
        """Each token's place in a list of all cells of all crops, row by row."""
        sizes = torch.tensor([h * w for h, w in self.grids])
        first = (sizes.cumsum(0) - sizes).to(self.crop.device)
        wide = torch.tensor([w for _, w in self.grids], device=self.crop.device)
        return first[self.crop] + self.y * wide[self.crop] + self.x

    def take(self, index: Tensor) -> "Layout":
        """The same of some of the tokens."""
        return Layout(
            self.picture[index], self.crop[index], self.y[index], self.x[index],
            self.grids, self.whole, self.regions, self.video,
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns, where the tokens are all cells of one crop, row by row."""
        if len(self.grids) != 1 or len(self) != self.grids[0][0] * self.grids[0][1]:
            return None
        return self.grids[0]

    @staticmethod
    def join(layouts: "list[Layout]") -> "Layout":
        """Several pictures as one list of tokens."""
        if len(layouts) == 1:
            return layouts[0]
        counts = [len(layout.grids) for layout in layouts]
        before = [sum(counts[:i]) for i in range(len(counts))]
        all_said = [layout.regions for layout in layouts if layout.regions is not None]
        return Layout(
            torch.cat([torch.full_like(layout.picture, i) for i, layout in enumerate(layouts)]),
            torch.cat([layout.crop + first for layout, first in zip(layouts, before, strict=True)]),
            torch.cat([layout.y for layout in layouts]),
            torch.cat([layout.x for layout in layouts]),
            tuple(grid for layout in layouts for grid in layout.grids),
            tuple(crop + first for layout, first in zip(layouts, before, strict=True) for crop in layout.whole),
            torch.cat(all_said) if len(all_said) == len(layouts) else None,
            all(layout.video for layout in layouts),
        )


By = Literal["class", "received"]
BY: tuple[By, ...] = ("class", "received")


@dataclass(frozen=True)
class Tower(_Visual):
    """The attention of one layer of the vision tower.

    `by` is whose attention: "class", that of the class token; or "received", the mean over all patches, for towers that
    have no class token. Which one is the caller's choice: a tower without a class token refuses "class". `layer` counts
    from 0, or from the end if negative; None is the layer whose features the language model gets. With `since` the
    attention, and its logits, are the mean over the layers from that share of the tower's depth up to this one.
    """

    by: By = "class"
    layer: int | None = None
    since: float | None = None

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise FewerError(f"by={self.by!r}: attention of the 'class' token, or 'received' from all patches")
        if self.since is not None and not 0 <= self.since < 1:
            raise FewerError(f"since={self.since!r}: a share of the tower's depth, from 0 to below 1")


@dataclass(frozen=True)
class TowerView:
    """What a layer of the tower says of n visual tokens, its patches averaged where several make one token.

    `attention` sums to one over a crop's patches and what stands before them (class and register tokens), so that it
    can be compared between crops; `logits` are the scaled products it comes from. `keys` are the patches' keys.
    """

    attention: Float[Tensor, "heads n"]
    logits: Float[Tensor, "heads n"]
    keys: Float[Tensor, "heads n d"]

    def take(self, index: Tensor) -> "TowerView":
        """The same of some of the tokens."""
        return TowerView(self.attention[:, index], self.logits[:, index], self.keys[:, index])

    @staticmethod
    def mean(layers: "list[TowerView]") -> "TowerView":
        """The mean of what several layers attend to, with the keys of the last."""
        if len(layers) == 1:
            return layers[0]
        attention, logits = torch.stack([one.attention for one in layers]), torch.stack([one.logits for one in layers])
        return TowerView(attention.mean(0), logits.mean(0), layers[-1].keys)

    @staticmethod
    def join(views: "list[TowerView]") -> "TowerView":
        """What is said of several crops or pictures, as one list of tokens."""
        return TowerView(
            torch.cat([view.attention for view in views], 1),
            torch.cat([view.logits for view in views], 1),
            torch.cat([view.keys for view in views], 1),
        )


@dataclass(frozen=True)
class Question(_Visual):
    """The states of the prompt's text at the place of the decision: what comes after the first picture of the row, or
    all of it where nothing does."""


@dataclass(frozen=True)
class Vocabulary(_Visual):
    """The input embeddings of all words of the language model, one row for each id."""


@dataclass(frozen=True)
class TextAttention(_Visual):
    """What the layer before a cut attended with; before the first layer there is none."""


@dataclass(frozen=True)
class Looked:
    """Queries of the row's text and all keys of its context, as the layer before a cut had them.

    `visual` are the columns of `key` that are the n tokens to decide about, `text` those of the text tokens, whose
    queries `query` holds in their order. Both are turned by their positions. `plain_query` and `plain_key` are not, and
    are of the latest forward alone, before which `before` keys had come; `turns` are its cosines and sines. `states`
    are the text tokens' own, and `after` marks those that come after the row's first picture.
    """

    query: Float[Tensor, "heads t d"]
    key: Float[Tensor, "kv_heads m d"]
    plain_query: Float[Tensor, "heads t d"]
    plain_key: Float[Tensor, "kv_heads fresh d"]
    visual: Int[Tensor, " n"]
    text: Int[Tensor, " t"]
    before: int
    states: Float[Tensor, "t hidden"]
    after: Bool[Tensor, " t"]
    scaling: float
    turns: Float[Tensor, "2 fresh turned"] | None = None

    def attention(
        self,
        rows: Int[Tensor, " r"],
        *,
        turned: bool = True,
        to: Int[Tensor, " c"] | None = None,
    ) -> Tensor:
        """What each head's queries of these text tokens give to the visual tokens, or to the columns `to` of `key`:
        `(heads, r, n)`, of a softmax over all of the row's context that each of them sees. `turned=False` leaves
        positions out."""
        query, key = (self.query, self.key) if turned else (self.plain_query, self.plain_key)
        first = 0 if turned else self.before
        query, at = query[:, rows].float(), self.text[rows] - first
        groups = query.shape[0] // key.shape[0]
        logits = query @ key.float().repeat_interleave(groups, 0).mT * self.scaling  # (heads, r, m)
        later = torch.arange(key.shape[1], device=key.device) > at.unsqueeze(1)
        return logits.masked_fill(later, -torch.inf).softmax(-1)[..., (self.visual if to is None else to) - first]


@dataclass(frozen=True)
class VisualEntries(_Visual):
    """Which entries of a cache are visual tokens, and how many of a row's may stay."""


@dataclass(frozen=True)
class Marked:
    """`visual` marks entries of every head, `final` text and those visual entries that every layer so far went on
    with; `wanted` is how many of each row's visual entries stay."""

    visual: Bool[Tensor, "b h n"]
    final: Bool[Tensor, "b h n"]
    wanted: tuple[int, ...]
