"""`fewer image`: which patches of a picture stay."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.cli.common import Json, ModelName, err, out, print_json, read_keep
from fewer.types import FewerError


def image(
    photo: Annotated[Path, typer.Argument(help="A picture file.")],
    method: Annotated[str, typer.Option(help="A method for encoders.")] = "tome",
    keep: Annotated[str, typer.Option(help="The share of patches left at the end, or '0.6 flops'.")] = "0.5",
    size: Annotated[int, typer.Option(help="Pixels a side that the model sees, a multiple of its patches.")] = 448,
    file: Annotated[Path, typer.Option("--out", help="Where the drawing goes.")] = Path("overlay.png"),
    model: ModelName = "default",
    as_json: Json = False,
) -> None:
    """Draw which patches of a picture were kept, and which went together."""
    import torch
    from PIL import Image, UnidentifiedImageError

    from fewer import compress, vision
    from fewer_eval.overlay import overlay

    try:
        with Image.open(photo) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as why:
        raise FewerError(f"{photo} is no picture that can be read: {why}") from why
    loaded, _ = vision.load_vision(model, say=err.print)
    pixels = vision.preprocess(picture, size)
    asked: Any = keep if "flops" in keep.lower() else read_keep(keep)
    with torch.inference_mode(), compress(loaded, method, asked) as run:
        loaded(pixel_values=pixels)
    assert run.grid is not None
    rows, columns = run.grid
    patches = run.assign[0, -rows * columns :].tolist()
    drawn = overlay(vision.square(picture, size), patches, run.grid, size // rows)
    try:
        drawn.save(file)
    except (OSError, ValueError) as why:
        raise FewerError(f"--out {file}: cannot be written as a picture: {why}") from why
    kept, dropped = len(set(patches) - {-1}), patches.count(-1)
    said = {"out": str(file), "method": method, "patches": len(patches), "tokens": kept, "dropped": dropped}
    if as_json:
        print_json({**said, "flops": run.flops})
        return
    out.print(f"{len(patches)} patches in {kept} tokens, {dropped} dropped; {run.flops:.2f} of the FLOPs; wrote {file}")
