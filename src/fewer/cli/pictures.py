"""`fewer image`: which patches of a picture stay, in an encoder or, with a question, in a vision-language model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.cli.common import (
    Json,
    ModelName,
    check_outputs,
    check_share,
    err,
    listed,
    out,
    print_json,
    read_keep,
    refuse_empty,
)
from fewer.methods import family_of, resolve
from fewer.types import FewerError


def image(
    photo: Annotated[Path, typer.Argument(help="A picture file.")],
    method: Annotated[
        str, typer.Option(help="A method for encoders; with --question one for visual tokens, or several: turbo,fastv.")
    ] = "tome",
    keep: Annotated[
        str, typer.Option(help="The share of patches left at the end, or '0.6 flops'; with --question also a count.")
    ] = "0.5",
    question: Annotated[str | None, typer.Option(help="Ask a vision-language model about the picture.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side that the model sees, a multiple of its patches; default 448.")
    ] = None,
    file: Annotated[Path, typer.Option("--out", help="Where the drawing goes.")] = Path("overlay.png"),
    model: ModelName = "default",
    as_json: Json = False,
) -> None:
    """Draw which patches of a picture were kept, and which went together."""
    import torch
    from PIL import Image, UnidentifiedImageError

    from fewer import compress, vision
    from fewer.allocate.schedule import Schedule
    from fewer_eval.overlay import overlay

    refuse_empty({"--question": question})
    check_outputs(("--out", file), read=[photo])
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise FewerError(f"--out {file}: no kind of picture ends so; let it end in .png")
    methods = listed(method, "--method")
    _check_families(methods, question is not None)
    try:
        with Image.open(photo) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as why:
        raise FewerError(f"{photo} is no picture that can be read: {why}") from why
    if question is not None:
        if size is not None:
            raise FewerError(f"--size {size}: with --question the model's processor decides that; leave it out")
        _asked(picture, question, methods, read_keep(keep), model, file, as_json)
        return
    if "flops" in keep.lower():
        asked = Schedule(keep).keep
    else:
        check_share(keep, ", or a share of the FLOPs such as '0.6 flops'")
        asked = read_keep(keep)
    (method,), size = methods, 448 if size is None else size
    pixels = vision.preprocess(picture, size)
    loaded, _ = vision.load_vision(model, say=err.print)
    with torch.inference_mode(), compress(loaded, method, asked) as run:
        loaded(pixel_values=pixels)
    assert run.grid is not None
    rows, columns = run.grid
    patches = run.assign[0, -rows * columns :].tolist()
    drawn = overlay(vision.square(picture, size), patches, run.grid, size // rows)
    _save(drawn, file)
    kept, dropped = len(set(patches) - {-1}), patches.count(-1)
    said = {"out": str(file), "method": method, "patches": len(patches), "tokens": kept, "dropped": dropped}
    if as_json:
        print_json({**said, "flops": run.flops})
        return
    out.print(f"{len(patches)} patches in {kept} tokens, {dropped} dropped; {run.flops:.2f} of the FLOPs; wrote {file}")


def _check_families(methods: list[str], asked: bool) -> None:
    """Refuse what shortens nothing of a picture, before a model is loaded."""
    families = [family_of(type(resolve(name))) for name in methods]
    if not asked and (len(methods) > 1 or families[0] not in ("vit", "any")):
        raise FewerError(
            f"--method {','.join(methods)}: without --question it is one method for encoders; `fewer methods --family "
            f"vit` lists them"
        )
    if asked and set(families) == {"kv"}:
        raise FewerError(
            f"--method {','.join(methods)} shortens a cache, and none of the visual tokens before it; name one that "
            f"does, alone or first, as in fastv,{methods[-1]}: `fewer methods --family vlm` lists them"
        )


def _save(drawn: Any, file: Path) -> None:
    try:
        drawn.save(file)
    except (OSError, ValueError) as why:
        raise FewerError(f"--out {file}: cannot be written as a picture: {why}") from why


def _asked(picture: Any, question: str, methods: list[str], keep: Any, name: str, file: Path, as_json: bool) -> None:
    """Ask with all visual tokens and with fewer, and draw which of them were left when the answer was given."""
    import torch

    from fewer import compress, reference_vlm, vision
    from fewer_eval.overlay import overlay

    model: Any
    processor: Any
    if name == "default":
        model, processor = reference_vlm.load(say=err.print)
        err.print("reference model trained for this, not a general one: it knows the questions of docs/vlm.md only")
        shown, text = vision.square(picture, reference_vlm.SIDE), reference_vlm.prompt(question)
    else:
        model, processor = pictured(name)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        shown, text = picture, processor.apply_chat_template(turn, add_generation_prompt=True)
    try:
        inputs = processor(images=[shown], text=[text], return_tensors="pt")
    except ValueError as why:
        size = f"{shown.width}x{shown.height}"
        raise FewerError(f"the processor of {name} makes no prompt of a picture of {size} pixels: {why}") from why

    def answer() -> str:
        written = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        said = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(said[0]).strip()

    with torch.inference_mode():
        whole = answer()
        with compress(model, methods, keep) as run:
            short = answer()
    grid, slots = run.drawn()
    side = max(8, 448 // max(grid))
    drawn = overlay(shown.resize((grid[1] * side, grid[0] * side)), slots, grid, side)
    _save(drawn, file)
    report = run.report
    if as_json:
        said = {"out": str(file), "method": "+".join(methods), "full": whole, "answer": short}
        print_json({**said, "visual": report.had, "mean": report.mean, "left": report.read[-1], "flops": report.flops})
        return
    out.print(f"all {report.had} visual tokens: {whole}", markup=False)
    out.print(f"{report.mean:.0f} a layer, {report.read[-1]:.0f} in the last: {short}", markup=False)
    out.print(f"{report.flops:.2f} of the FLOPs; wrote {file}", markup=False)


def pictured(name: str) -> tuple[Any, Any]:
    """A vision-language model and its processor, by path or hub name."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from fewer.models import explained, look_for

    processors: Any = AutoProcessor
    with explained(name, "vision-language model", "HuggingFaceTB/SmolVLM-256M-Instruct"):
        look_for(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False)
        return model.eval(), processors.from_pretrained(name, trust_remote_code=False)
