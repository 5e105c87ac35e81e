"""Scenes with the tower's features of them, computed once and kept in the cache folder."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewer.vision import preprocess
from fewer_eval.looking.hints import marks
from fewer_eval.looking.scenes import Scene, scene

SHARD = 100
"""Scenes a file."""


@dataclass(frozen=True)
class Pool:
    """Scenes of one sort, without their pictures, what their patches show, and the tower's features in float16."""

    scenes: Sequence[Scene]
    marks: Sequence[Int64[Tensor, "p m"]]
    features: Float[Tensor, "s p d"]

    def draw(self, rng: random.Random) -> int:
        return rng.randrange(len(self.scenes))


def seen(tower: Any, pictures: Sequence[Image.Image], quick: bool = False) -> Float[Tensor, "s p d"]:
    """What LLaVA takes from the tower: its last layer but one, without the class token; `quick` in half precision,
    which is off by a hundredth of the features' deviation."""
    pixels = torch.cat([preprocess(picture) for picture in pictures]).to(tower.device)
    with torch.inference_mode(), torch.autocast(tower.device.type, torch.bfloat16, enabled=quick):
        found: Tensor = tower(pixels, output_hidden_states=True).hidden_states[-2]
    return found[:, 1:].float()


def pool(
    sort: str, many: int, tower: Any, folder: Path, held_out: bool = False, say: Callable[[str], None] = print
) -> Pool:
    """The scenes of the seeds 0 to `many`, rounded up to whole files; what is in `folder` is not seen again.

    Remove the folder when scenes are drawn in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes, features = [], []
    for start in range(0, many, SHARD):
        drawn = [scene(sort, seed, held_out) for seed in range(start, start + SHARD)]
        file = folder / f"{sort}-{'held-out' if held_out else 'training'}-{start:06d}.safetensors"
        if not file.exists():
            batches = [drawn[i : i + 10] for i in range(0, SHARD, 10)]
            found = torch.cat(
                [seen(tower, [one.picture for one in batch], quick=True).half().cpu() for batch in batches]
            )
            save_file({"features": found}, file.with_suffix(".partial"))
            file.with_suffix(".partial").replace(file)
            say(f"{file.name}: the tower has seen {SHARD} more")
        features.append(load_file(file)["features"])
        blank = Image.new("L", (1, 1))
        scenes += [replace(one, picture=blank) for one in drawn]
    return Pool(scenes, [marks(one) for one in scenes], torch.cat(features))
