"""`fewer fit`: what a method needs to know of a model beforehand."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fewer import fit as fits
from fewer.cli.common import Json, ModelName, check_outputs, err, out, print_json, read_text
from fewer.methods import METHODS, resolve
from fewer.types import FewerError

TAKES = {"images": ("--size", "--flops"), "cited": ("--tokens",), "documents": ("--tokens",)}
"""What says how much to fit on, by what it is; for the others it is --tokens and --length."""


def fit_method(
    method: str,
    file: Annotated[Path, typer.Option("--out", help="Where the fit goes.")],
    data: Annotated[
        Path | None,
        typer.Option(help="What to fit on instead of what is built in: a text file, or a folder of pictures."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to fit on, in all; default 12,000, or 90,000 for llmlingua2.", min=64)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Length of a context in tokens, for methods of caches; default 1000.", min=64)
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels a side, for methods that are fitted on pictures; default 224.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="The share of FLOPs to fit to, for methods that want one.")
    ] = None,
    seed: int = 0,
    model: ModelName = "default",
    as_json: Json = False,
) -> None:
    """Compute what a method needs to know of a model beforehand, and keep it in a file for --fit."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fewer.models import load

    known = METHODS.get(method) or type(resolve(method))
    fit_to = getattr(known, "fit_to", None)
    if fit_to is None:
        able = ", ".join(name for name, one in METHODS.items() if fits.wants(one))
        raise FewerError(f"{method} needs no fit; methods that want one are {able}")
    check_outputs(("--out", file), read=[data])
    fits_on = getattr(known, "fits_on", "text")
    takes = TAKES.get(fits_on, ("--tokens", "--length"))
    for option, value in {"--tokens": tokens, "--length": length, "--size": size, "--flops": flops}.items():
        if value is not None and option not in takes:
            raise FewerError(f"{option} {value} means nothing for {method}, which takes {' and '.join(takes)}")
    options = {} if flops is None else {"flops": flops}
    loaded: Any
    if fits_on == "images":
        loaded, contexts = _pictures(data, model, 224 if size is None else size)
    elif fits_on == "cited":
        from fewer.score.embed import embedder
        from fewer_eval.cited import passages

        if data is not None:
            raise FewerError(f"--data {data}: {method} is fitted to passages that are made for it, not to a text")
        loaded = embedder("minilm" if model == "default" else model)
        contexts = passages(max(10, (tokens or 90_000) // 110), seed)  # tokens of a passage
    elif fits_on == "documents":
        from fewer.score.surprise import Reader

        contexts = _documents(None if data is None else read_text(data, "--data"), tokens or 90_000, seed)
        loaded = Reader(*load(model, say=err.print))
    else:
        own = None if data is None else read_text(data, "--data")
        loaded, tokenizer = load(model, say=err.print)
        contexts = (needles if fits_on == "needles" else contexts_of)(
            tokenizer, own, tokens or 12_000, length or 1000, seed
        )  # fmt: skip
    columns = (TextColumn("{task.description:32s}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("starting", total=1.0)

        def tick(what: str, share: float) -> None:
            progress.update(bar, description=what, completed=share)

        fitted: fits.Fit = fit_to(loaded, contexts, seed=seed, tick=tick, **options)
        progress.update(bar, description="done", completed=1.0)
    fits.save(fitted, file)
    if as_json:
        said = {"out": str(file), "method": fitted.method, "model": fitted.model, "notes": dict(fitted.notes)}
        print_json(said)
        return
    for name, note in fitted.notes.items():
        out.print(f"{name}: {note}", highlight=False, markup=False)
    out.print(f"wrote {file}", highlight=False, markup=False)


def _pictures(data: Path | None, name: str, size: int) -> tuple[Any, list[Any]]:
    """A vision model, and pictures for it: those of a folder, or the built-in photographs."""
    from PIL import Image, UnidentifiedImageError

    from fewer import vision
    from fewer_eval.pictures import photographs

    if data is None:
        pictures = list(photographs(say=err.print).values())
    elif not data.is_dir():
        raise FewerError(f"--data {data}: there is no such folder of pictures")
    else:
        pictures = []
        for path in sorted(data.iterdir()):
            try:
                with Image.open(path) as opened:
                    pictures.append(opened.convert("RGB"))
            except (OSError, UnidentifiedImageError):
                err.print(f"{path} is no picture and left out", markup=False)
    if not pictures:
        raise FewerError(f"--data {data}: there is no picture in it")
    model, _ = vision.load_vision(name, say=err.print)
    return model, [vision.preprocess(picture, size) for picture in pictures]


def _documents(own: str | None, tokens: int, seed: int) -> list[str]:
    """Documents to train a classifier on: an own text in pieces, or what is built in; `tokens` in all, about."""
    from fewer_eval.documents import documents, pieces

    count = max(2, tokens // 380)  # tokens of a document of 1,600 characters
    return documents(count, seed, say=err.print) if own is None else pieces(own)[:count]


def contexts_of(tokenizer: Any, own: str | None, tokens: int, length: int, seed: int) -> list[Any]:
    """Token ids (1, n) of contexts to fit on, each of `length` tokens, `tokens` in all."""
    from fewer_eval.fitting import mixture

    # a token is seldom longer than this; more text would only be tokenised for nothing
    text = (mixture(8 * tokens, seed) if own is None else own)[: 16 * tokens]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if not ids.numel():
        raise FewerError("there is no text to fit on")
    return list(ids.split(length, dim=1))


def needles(tokenizer: Any, own: str | None, tokens: int, length: int, seed: int) -> list[Any]:
    """Questions about facts in `length` tokens of text, `tokens` in all, in the model's chat template if it has one."""
    from fewer.score.retrieval import Needle
    from fewer_eval.fitting import asked

    made = []
    for about in asked(tokenizer, length, max(1, tokens // length), seed, own):
        text = f"{about.text}\n\n{about.question}"
        if tokenizer.chat_template is not None:
            message = [{"role": "user", "content": text}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        else:
            text += "\n"
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
        starts, ends = read.offset_mapping[0].unbind(-1)
        start, end = text.index(about.fact), text.index(about.fact) + len(about.fact)
        inside, said = ((ends > left) & (starts < end) for left in (start, end - len(about.answer)))
        first, last = inside.nonzero()[[0, -1], 0].tolist()
        made.append(Needle(read.input_ids, first, last + 1, read.input_ids[0, said]))
    return made
