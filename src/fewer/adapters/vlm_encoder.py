"""Fewer tokens before the language model sees any: a method for encoders inside the vision tower, or fewer pixels.

Either way the model's own code goes on with as many features as its prompt has placeholders: those that were merged
stand there as copies, and which of them are to go on is said to the first cut, that drops the others.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewer.adapters import encoder_blocks, encoder_run, encoder_setting
from fewer.adapters.vlm_tower import tower_of
from fewer.allocate.lattice import Lattice
from fewer.allocate.schedule import Schedule, halved
from fewer.types import Budget, Method, Site, Tokens, UnsupportedModel

BEFORE = -2
"""The place of this stage among the cuts, of which -1 is before the language model's first layer."""
FAMILIES = ("llava", "llava_next", "llava_onevision")
"""Families in which every patch of the tower is one token."""


class Early:
    """A model's first stage, where it acts on the tower or on its pixels; `count` says how many of how many stay."""

    def __init__(self, model: Any, method: Method, count: Callable[[int], int]) -> None:
        self.base, self.method, self.count = model.base_model, method, count
        self.pixels: bool = getattr(method, "pixels", False)
        kind, name = model.config.model_type, type(method).__name__
        if self.pixels and kind != "llava":
            raise UnsupportedModel(
                f"{name} takes smaller pictures, which {type(model).__name__} packs in its own way; it serves models "
                "of the llava family"
            )
        if kind not in FAMILIES:
            raise UnsupportedModel(
                f"{name} shortens the vision tower's patches, of which {type(model).__name__} makes one token out of "
                f"several; it serves the families {', '.join(FAMILIES)}"
            )
        self.tower: Any = tower_of(self.base)
        found = None if self.pixels else encoder_blocks.find(self.tower)
        if not self.pixels and found is None:
            raise UnsupportedModel(
                f"{type(self.tower).__name__} has no blocks that fewer knows: {encoder_blocks.HOSTS}"
            )
        self.found = found

    def run(self, own: Callable[..., Any], given: dict[str, Any]) -> tuple[Any, Tensor]:
        """The model's feature function, with fewer tokens inside: its output, at full length, and which patches of each
        image of the tower go on, `(images, k)`."""
        pixels: Tensor = given["pixel_values"]
        patch = self.tower.config.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        if self.pixels:
            return self._smaller(own, given, grid, patch)
        assert self.found is not None
        patches = grid[0] * grid[1]
        share = self.count(patches) / patches
        depth, at = len(self.found[1]), _layer(self.base.config, len(self.found[1]))
        places = [p for p in encoder_run.places_of(self.method, depth) if p <= at]
        if not places:
            raise UnsupportedModel(f"{type(self.method).__name__} acts after the layer whose features are used")
        shape = str(getattr(self.method, "schedule", "constant"))
        shares = Schedule(share, shape).shares(len(places))
        if getattr(self.method, "halves", False):
            shares = halved(shares, share)
        by_layer = dict(zip(places, shares, strict=True))
        listed, left = [], 1.0
        for layer in range(depth):
            left = by_layer.get(layer, left)
            listed.append(left)
        setting = encoder_setting.Setting.of(self.method, listed, None, None, None, "copy", False)
        with encoder_run.session(self.tower, self.found, setting) as run:
            output = own(**given)
            prefix = run.state.prefix if run.state is not None else 0
            kept = run.kept - prefix
        return output, kept

    def _smaller(
        self, own: Callable[..., Any], given: dict[str, Any], grid: tuple[int, int], patch: int
    ) -> tuple[Any, Tensor]:
        n = grid[0] * grid[1]
        positions = torch.arange(n).unsqueeze(0)
        none = torch.zeros(1, n, dtype=torch.bool)
        tokens = Tokens(torch.zeros(1, n, 1), positions, none, none, torch.tensor([n]), site=Site(BEFORE, grid=grid))
        count = self.count(n)
        allocation = self.method.allocate(tokens, self.method.score(tokens), Budget(count, tokens=count))
        assert isinstance(allocation, Lattice)
        rows, columns = allocation.shape[0].tolist()
        small = F.interpolate(
            given["pixel_values"], (rows * patch, columns * patch), mode="bilinear", antialias=True, align_corners=False
        )
        more = {}
        if "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters:
            more["interpolate_pos_encoding"] = True
        output = own(**{**given, "pixel_values": small, **more})
        y, x = torch.arange(n) // grid[1] * rows // grid[0], torch.arange(n) % grid[1] * columns // grid[1]
        source = (y * columns + x).to(small.device)
        output.pooler_output = [features[source] for features in output.pooler_output]
        plan = self.method.reduce(tokens, self.method.score(tokens), allocation)
        return output, plan.survivors.to(small.device).expand(len(output.pooler_output), -1)


def _layer(config: Any, depth: int) -> int:
    """The block whose output the language model gets."""
    features = getattr(config, "vision_feature_layer", -1)
    features = max(features) if isinstance(features, (list, tuple)) else features
    return int(features) - 1 if features >= 0 else depth + int(features)
