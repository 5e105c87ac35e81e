"""The command line: thin functions that read options and call the library."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fewer import fit as fits
from fewer.compress import compress
from fewer.methods import METHODS, family_of, of_family, resolve
from fewer.types import Budget, FewerError, Keep, UnknownName

if TYPE_CHECKING:
    from fewer_eval.tasks import Task

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
out = Console(width=None if sys.stdout.isatty() else 140)  # in a pipe, wide enough for the tables
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON and print nothing else to stdout.")]
ModelName = Annotated[str, typer.Option("--model", help="A path, a hub name, or 'default'.")]
Fits = Annotated[list[Path] | None, typer.Option("--fit", help="A file that `fewer fit` made for one of the methods.")]


def describe(name: str) -> dict[str, Any]:
    """One method as plain data, the same for the table, `--json` and the README."""
    method = resolve(name)
    cls: Any = type(method)
    card = cls.card
    return {
        "name": name,
        "family": family_of(cls),
        "mechanism": card.mechanism,
        "training": card.training,
        "needs": sorted(type(need).__name__.lower() for need in method.needs),
        "faithfulness": card.faithfulness,
        "source": card.source,
        "papers": list(card.slugs),
    }


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="Only this family, such as kv.")] = None, as_json: Json = False
) -> None:
    """List the methods by family and mechanism."""
    found = [describe(name) for name in METHODS]
    families = sorted({method["family"] for method in found} - {"any"})  # those stand under every family
    if family is not None and family not in families:
        raise UnknownName(f"--family {family!r}: known families are {', '.join(families)}")
    found = [method for method in found if family is None or method["family"] in (family, "any")]
    if as_json:
        print(json.dumps(found))  # noqa: T201  # plain, for machines: rich would wrap it
        return
    table = Table("name", "family", "mechanism", "training", "needs", "faithfulness", "source")
    for method in sorted(found, key=lambda m: (m["family"], m["mechanism"])):
        table.add_row(*(", ".join(v) if isinstance(v, list) else v for k, v in method.items() if k != "papers"))
    out.print(table)


@app.command()
def show(method: str, as_json: Json = False) -> None:
    """Show one method: what it does, what it needs, how faithful it is, where it comes from."""
    made = resolve(method)
    cls: Any = type(made)
    described = describe(method)
    text = (sys.modules[cls.__module__].__doc__ or "").strip()
    if as_json:
        print(json.dumps({**described, "text": text, "differs": cls.card.differs, "defaults": repr(made)}))  # noqa: T201
        return
    out.print(text, highlight=False, markup=False)
    out.print()
    for key in ("family", "mechanism", "training", "needs", "faithfulness", "source"):
        value = described[key]
        out.print(f"{key + ':':14s}{', '.join(value) or 'nothing' if isinstance(value, list) else value}", markup=False)
    out.print(f"{'defaults:':14s}{made}", markup=False)


@app.command()
def compare(
    methods: Annotated[
        str, typer.Option(help="Names, comma-separated, or 'all'; with a store as in snapkv+kivi-4bit.")
    ] = "all",
    keep: Annotated[str, typer.Option(help="Budgets, comma-separated: fractions, token counts or bytes.")] = "0.5,0.25",
    tasks: Annotated[str, typer.Option(help="Names, comma-separated, or 'all'.")] = "needle-single,text",
    tokens: Annotated[int, typer.Option(help="Length of a context in tokens.", min=64)] = 1000,
    samples: Annotated[int, typer.Option(help="Samples of each task; of running text a third as many.", min=1)] = 20,
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(help="Your own JSONL of context, question, answer, as the task.")] = None,
    unseen: Annotated[bool, typer.Option(help="With --data: hide the question from the compressor.")] = False,
    fit: Fits = None,
    folder: Annotated[Path, typer.Option("--out", help="Where report.html and results.jsonl go.")] = Path("out"),
    model: ModelName = "default",
    as_json: Json = False,
) -> None:
    """Measure what methods save and lose on a model: a table, DIR/report.html and DIR/results.jsonl."""
    from fewer_eval import tasks as known
    from fewer_eval.schema import Question

    chosen = _fitted(_listed(methods), fit)
    keeps = [_keep(text) for text in _listed(keep)]
    own = None if data is None else known.from_jsonl(data)
    run = [own] if own is not None else _tasks(tasks)
    if unseen and own is None:
        raise FewerError("--unseen goes with --data; the built-in tasks are measured both ways")
    questions: tuple[Question, ...] = ("unseen", "seen") if own is None else ("unseen",) if unseen else ("seen",)
    _compare(model, run, chosen, keeps, tokens, samples, seed, questions, folder, as_json)


def _compare(
    model_name: str, tasks: "list[Task]", chosen: list[Any], keeps: list[Keep], tokens: int, samples: int, seed: int,
    questions: Any, folder: Path, as_json: bool,
) -> None:  # fmt: skip
    from datetime import date

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from fewer.models import load
    from fewer_eval import environment, report
    from fewer_eval.runner import compare, samples_of
    from fewer_eval.schema import RunInfo

    model, tokenizer = load(model_name, say=err.print)
    total = sum(samples_of(task, samples) for task in tasks)
    columns = (TextColumn("{task.description:24s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as progress:
        bar, started = progress.add_task("loading", total=total), [False]

        def tick(what: str) -> None:
            progress.update(bar, description=what, advance=int(started[0]))
            started[0] = True

        done = compare(
            model, tokenizer, tasks, chosen, keeps, tokens=tokens, samples=samples, seed=seed, questions=questions,
            model_name=model_name, tick=tick,
        )  # fmt: skip
        progress.update(bar, description="done", completed=total)
    info = RunInfo(
        model=model_name, command=" ".join(["fewer", *sys.argv[1:]]), date=date.today().isoformat(), seed=seed,
        tokens=tokens, samples=samples, hardware=environment.hardware(), versions=environment.versions(),
        kept=done.kept, notes=done.notes,
    )  # fmt: skip
    report.write_html(folder / "report.html", done.rows, info)
    report.write_jsonl(folder / "results.jsonl", done.rows, info)
    if as_json:
        print(json.dumps({"rows": [row.to_dict() for row in done.rows]}))  # noqa: T201
        return
    out.print(report.table(done.rows))
    out.print(report.summary(done.rows), highlight=False)
    out.print(f"wrote {folder / 'report.html'} and {folder / 'results.jsonl'}", highlight=False)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --file.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file ('-' is standard input).")] = None,
    method: str = "snapkv",
    keep: str = "0.25",
    when: Annotated[str | None, typer.Option(help="Compress at 'prefill', 'decode' or 'both'.")] = None,
    every: Annotated[int | None, typer.Option(help="Decoding steps between two compressions.")] = None,
    store: Annotated[str | None, typer.Option(help="How what is kept is held, such as kivi-4bit.")] = None,
    fit: Fits = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    plain: Annotated[bool, typer.Option(help="Do not wrap the prompt in the model's chat template.")] = False,
    model: ModelName = "default",
    as_json: Json = False,
) -> None:
    """Answer a prompt from a compressed cache; the text goes to stdout, the report to stderr."""
    import torch

    from fewer.models import load

    text = _prompt(prompt, file)
    (chosen,), budget = _fitted([method], fit), _keep(keep)
    loaded, tokenizer = load(model, say=err.print)
    if not plain and tokenizer.chat_template is not None:
        message = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=plain)
    with torch.inference_mode(), compress(loaded, chosen, budget, when=when, every=every, store=store) as run:
        run_model: Any = loaded.generate  # its type is lost behind the model class's attributes
        tokens = run_model(**ids, max_new_tokens=max_new_tokens, do_sample=False)
    answer = str(tokenizer.decode(tokens[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    if as_json:
        print(json.dumps({"text": answer, "report": run.report.to_dict()}))  # noqa: T201
        return
    print(answer)  # noqa: T201
    err.print(str(run.report), highlight=False, markup=False)


@app.command()
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
    asked: Any = keep if "flops" in keep.lower() else _keep(keep)
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
        print(json.dumps({**said, "flops": run.flops}))  # noqa: T201
        return
    out.print(f"{len(patches)} patches in {kept} tokens, {dropped} dropped; {run.flops:.2f} of the FLOPs; wrote {file}")


@app.command("fit")
def fit_method(
    method: str,
    file: Annotated[Path, typer.Option("--out", help="Where the fit goes.")],
    data: Annotated[
        Path | None,
        typer.Option(help="What to fit on instead of what is built in: a text file, or a folder of pictures."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to fit on, in all.", min=64)] = 12_000,
    length: Annotated[int, typer.Option(help="Length of a context in tokens.", min=64)] = 1000,
    size: Annotated[int, typer.Option(help="Pixels a side, for methods that are fitted on pictures.")] = 224,
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

    fit_to = getattr(type(resolve(method)), "fit_to", None)
    if fit_to is None:
        able = ", ".join(name for name, known in METHODS.items() if fits.wants(known))
        raise FewerError(f"{method} needs no fit; methods that want one are {able}")
    if not file.parent.is_dir():
        raise FewerError(f"--out {file}: there is no folder {file.parent}")
    fits_on, options = getattr(type(resolve(method)), "fits_on", "text"), {}
    if flops is not None:
        if fits_on != "images":
            raise FewerError(f"--flops {flops}: {method} is not fitted to a share of FLOPs")
        options["flops"] = flops
    loaded: Any
    if fits_on == "images":
        loaded, contexts = _pictures(data, model, size)
    else:
        own = None if data is None else _text(data, "--data")
        loaded, tokenizer = load(model, say=err.print)
        contexts = (_needles if fits_on == "needles" else _contexts)(tokenizer, own, tokens, length, seed)
    columns = (TextColumn("{task.description:32s}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        bar = progress.add_task("starting", total=1.0)

        def tick(what: str, share: float) -> None:
            progress.update(bar, description=what, completed=share)

        made: fits.Fit = fit_to(loaded, contexts, seed=seed, tick=tick, **options)
        progress.update(bar, description="done", completed=1.0)
    fits.save(made, file)
    if as_json:
        said = {"out": str(file), "method": made.method, "model": made.model, "notes": dict(made.notes)}
        print(json.dumps(said))  # noqa: T201
        return
    for name, note in made.notes.items():
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


def _contexts(tokenizer: Any, own: str | None, tokens: int, length: int, seed: int) -> list[Any]:
    """Token ids (1, n) of contexts to fit on, each of `length` tokens, `tokens` in all."""
    from fewer_eval.fitting import mixture

    # a token is seldom longer than this; more text would only be tokenised for nothing
    text = (mixture(8 * tokens, seed) if own is None else own)[: 16 * tokens]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[:, :tokens]
    if not ids.numel():
        raise FewerError("there is no text to fit on")
    return list(ids.split(length, dim=1))


def _needles(tokenizer: Any, own: str | None, tokens: int, length: int, seed: int) -> list[Any]:
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


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise FewerError("give a prompt, or --file, and not both")
    if prompt is None:
        assert file is not None
        prompt = _text(file, "--file")
    if not prompt.strip():
        raise FewerError("the prompt is empty")
    return prompt


def _text(file: Path, option: str) -> str:
    try:
        return sys.stdin.buffer.read().decode() if str(file) == "-" else file.read_bytes().decode()
    except OSError as error:
        raise FewerError(f"{option} {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise FewerError(f"{option} {file} is not UTF-8 text (byte {error.start})") from None


def _fitted(names: list[str], files: list[Path] | None) -> list[Any]:
    """The methods of these names, or all of them, each with its fit where one was given."""
    given = {fit.method: fit for fit in map(fits.load, files or [])}
    if names == ["all"]:
        left = [name for name, known in of_family("kv").items() if fits.wants(known) and name not in given]
        names = [name for name in of_family("kv") if name not in left]
        if left:
            err.print(f"left out, since they want a --fit: {', '.join(left)}", highlight=False)
    if spare := sorted(given.keys() - set(names)):
        raise FewerError(f"--fit was given for {', '.join(spare)}, which is not among the methods asked for")
    made = [name if "+" in name else resolve(name) for name in names]  # compare() reads the others itself
    return [
        replace(method, fit=given[name]) if name in given else method  # type: ignore[type-var]
        for name, method in zip(names, made, strict=True)
    ]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _keep(text: str) -> Keep:
    return Budget.parse(text).keep


def _tasks(text: str) -> "list[Task]":
    from difflib import get_close_matches

    from fewer_eval.tasks import TASKS

    names = list(TASKS) if text == "all" else _listed(text)
    for name in names:
        if name not in TASKS:
            near = " or ".join(get_close_matches(name, TASKS, n=3)) or "one of them"
            raise UnknownName(f"--tasks {name!r}: did you mean {near}? Known are {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def main() -> None:
    """Run the command line; what a user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except FewerError as error:
        err.print(f"fewer: {error}", style="red", highlight=False, markup=False)
        raise SystemExit(2) from None
