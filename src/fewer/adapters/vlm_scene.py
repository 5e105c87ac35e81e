"""The pictures of a forward: what was encoded, matched to the placeholders of the prompt it stands in.

Taps      stands before the model's get_image_features and get_video_features, and keeps what they were given
scene     rows of pictures: their columns in the prompt, their layout, what the tower saw in them
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewer.adapters.vlm_encoder import Early
from fewer.adapters.vlm_layout import FAMILIES, Piece, picture
from fewer.adapters.vlm_tower import Watch
from fewer.signals.visual import Layout, Tower, TowerView
from fewer.types import FewerError, UnsupportedModel


@dataclass
class Picture:
    """One picture, or video, of one row: the columns of its tokens, and of the separators between them."""

    layout: Layout
    columns: Tensor
    separators: Tensor
    views: dict[Tower, TowerView]
    alive: Tensor
    """Which of its tokens go on still, by their number in the layout."""

    @property
    def whole(self) -> bool:
        """Whether all of them do; then the separators do too."""
        return len(self.alive) == len(self.columns)

    @property
    def left(self) -> int:
        """Tokens that go on still, separators counted."""
        return len(self.alive) + (len(self.separators) if self.whole else 0)


class Taps:
    """What was encoded last and not yet read by the language model, in order."""

    def __init__(self, model: Any, needs: frozenset[Tower], early: Early | None = None) -> None:
        self.base, self.early = model.base_model, early
        self.describe, self.group = FAMILIES[model.config.model_type]
        self.watch = Watch(self.base, needs) if needs else None
        self.pieces: dict[str, list[tuple[Piece, dict[Tower, TowerView]]]] = {"image": [], "video": []}

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as leaving:
            if self.watch is not None:
                leaving.enter_context(self.watch.attached())
            for kind in ("image", "video"):
                name = f"get_{kind}_features"
                own = getattr(self.base, name, None)
                if own is None:
                    continue
                if name in vars(self.base):
                    raise FewerError(f"another tool replaced {name} of this {type(self.base).__name__}")
                setattr(self.base, name, self._tap(own, kind))
                leaving.callback(vars(self.base).pop, name)
            yield

    def _tap(self, own: Callable[..., Any], kind: str) -> Callable[..., Any]:
        names = list(inspect.signature(own).parameters)

        @functools.wraps(own)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if self.watch is not None:
                self.watch.begin()
            given, left = {**dict(zip(names, args, strict=False)), **kwargs}, None
            if self.early is not None and kind == "image":
                output, left = self.early.run(own, given)
            elif self.early is not None:
                raise UnsupportedModel("a stage inside the vision tower serves pictures, and this is a video")
            else:
                output = own(*args, **kwargs)
            self._keep(kind, given, output, left)
            return output

        return tapped

    def _keep(self, kind: str, given: dict[str, Any], output: Any, left: Tensor | None) -> None:
        features = list(getattr(output, "pooler_output", output))
        pieces = self.describe(self.base, kind == "video", given, features)
        made, expected = sum(map(len, features)), sum(map(len, pieces))
        if made != expected:
            raise UnsupportedModel(
                f"{type(self.base).__name__} made {made} tokens of {len(pieces)} {kind}s, and {expected} were expected "
                f"of their {[piece.layout.grids for piece in pieces]}: this version packs pictures in a way that fewer "
                "does not know"
            )
        views: list[dict[Tower, TowerView]] = [{} for _ in pieces]
        if self.watch is not None:
            order = _window_order(self.base, given, kind)
            views = self.watch.views([p.layout for p in pieces], [p.crops for p in pieces], order)
        device = features[0].device if features else "cpu"
        alive, first = [], 0
        for one in pieces:
            alive.append(None if left is None else _alive(one.layout, left[first : first + one.crops].to("cpu")))
            first += one.crops
        moved = [
            Piece(_on(p.layout, device), p.content.to(device), p.crops, None if a is None else a.to(device))
            for p, a in zip(pieces, alive, strict=True)
        ]
        self.pieces[kind] = list(zip(moved, views, strict=True))  # a forward reads what was encoded last

    def scene(self, ids: Tensor) -> list[list[Picture]]:
        """The pictures of every row, in the order of the prompt; what was waiting is taken."""
        rows: list[list[Picture]] = [[] for _ in range(len(ids))]
        for kind in ("image", "video"):
            mark = getattr(self.base.config, f"{kind}_token_id", None)
            columns = [] if mark is None else [(row == mark).nonzero().flatten() for row in ids]
            there = sum(map(len, columns))
            if not there:
                continue  # a chunk of a prompt: what waits is for a later one
            waiting, self.pieces[kind] = self.pieces[kind], []
            have = sum(len(piece) for piece, _ in waiting)
            if not have:
                raise FewerError(
                    f"the prompt has {there} {kind} tokens and no {kind} was encoded inside fewer.compress: pass "
                    "pixels, not features that were made before, and with a cache only what it has not read"
                )
            times = there // have  # beams: every row several times, encoded once
            alike = [len(mine) == len(columns[row - row % times]) for row, mine in enumerate(columns)] if times else []
            if times * have != there or len(ids) % times or not all(alike):
                raise FewerError(
                    f"the prompt has {there} {kind} tokens, and {have} were made of its {kind}s: a processor of the "
                    "model puts in as many as there are; a prompt cannot be cut into chunks inside a picture"
                )
            taken: list[Any] = []
            for number, mine in enumerate(columns):
                if number % times == 0:
                    taken, waiting = _share(waiting, len(mine), kind)
                rows[number] += self._pictures(ids[number], mine, taken)
        for row in rows:
            row.sort(key=lambda one: int(one.columns[0]))
        return rows

    def _pictures(
        self, row: Tensor, columns: Tensor, pieces: list[tuple[Piece, dict[Tower, TowerView]]]
    ) -> list[Picture]:
        if not pieces:
            return []
        made, first, at = [], 0, 0
        for count in self.group(row, columns, [len(piece) for piece, _ in pieces]):
            mine = pieces[first : first + count]
            whole = picture([piece for piece, _ in mine])
            views = {need: TowerView.join([v[need] for _, v in mine]) for need in mine[0][1]}
            run = columns[at : at + len(whole)]
            content = run[whole.content]
            everyone = torch.arange(len(content), device=content.device) if whole.alive is None else whole.alive
            made.append(Picture(whole.layout, content, run[~whole.content], views, everyone))
            first, at = first + count, at + len(whole)
        return made


def _alive(layout: Layout, left: Tensor) -> Tensor:
    """Which tokens are patches that go on: `left` `(crops, k)` are those of every image of the tower."""
    _, columns = layout.grids[0]
    at = layout.y * columns + layout.x
    return (left[layout.crop] == at.unsqueeze(1)).any(1).nonzero().flatten()


def _share(waiting: list[Any], tokens: int, kind: str) -> tuple[list[Any], list[Any]]:
    """As many of those that wait as make up so many tokens, and the rest."""
    count, left = 0, tokens
    while left > 0 and count < len(waiting):
        left -= len(waiting[count][0])
        count += 1
    if left:
        raise FewerError(f"a row of the prompt has {tokens} {kind} tokens, which no number of its {kind}s adds up to")
    return waiting[:count], waiting[count:]


def _on(layout: Layout, device: Any) -> Layout:
    return replace(
        layout,
        picture=layout.picture.to(device),
        crop=layout.crop.to(device),
        y=layout.y.to(device),
        x=layout.x.to(device),
        regions=None if layout.regions is None else layout.regions.to(device),
    )


def _window_order(base: Any, given: dict[str, Any], kind: str) -> Tensor | None:
    """Qwen2.5-VL's tower puts its patches in the order of windows."""
    tower: Any = getattr(base, "visual", None)
    if getattr(tower, "window_size", None) is None or not hasattr(tower, "fullatt_block_indexes"):
        return None
    grid = given[f"{kind}_grid_thw"]
    if hasattr(tower, "get_window_index"):  # up to 5.2
        return torch.as_tensor(tower.get_window_index(grid)[0])
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return order
