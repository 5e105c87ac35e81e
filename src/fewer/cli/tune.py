"""`fewer tune`: the setting with a promise, for a model and a user's own examples."""

import json
import shlex
import sys
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.cli.common import Json, ModelName, check_outputs, err, listed, out, print_json, progress
from fewer.types import FewerError


class Aim(str, Enum):
    """What is to become small."""

    memory = "memory"
    latency = "latency"
    tokens = "tokens"


def tune(
    data: Annotated[Path, typer.Option(help="Your JSONL: context, question, answer; or image, question, answer.")],
    model: ModelName = "default",
    loss: Annotated[float, typer.Option(help="The expected loss that may be, in (0, 1).")] = 0.02,
    confidence: Annotated[float, typer.Option(help="Of the promise, in (0, 1).")] = 0.95,
    aim: Annotated[Aim, typer.Option("--for", help="What is to become small.")] = Aim.memory,
    methods: Annotated[
        str | None, typer.Option(help="What to try, comma-separated: snapkv, kvzip+kivi-4bit, llmlingua2, ...")
    ] = None,
    measure: Annotated[str, typer.Option(help="What counts as lost: wrong, changed or numbers.")] = "wrong",
    unseen: Annotated[bool, typer.Option(help="Compress contexts before their question is read.")] = False,
    levels: Annotated[bool, typer.Option(help="Also search budgets for single layers and heads.")] = True,
    fit: Annotated[list[Path] | None, typer.Option("--fit", help="A file that `fewer fit` made.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: int = 0,
    plan: Annotated[Path, typer.Option(help="Where the plan goes.")] = Path("plan.toml"),
    folder: Annotated[Path, typer.Option("--out", help="Where the record and report.html go.")] = Path("tuned"),
    as_json: Json = False,
) -> None:
    """Search methods and budgets for the smallest setting whose expected loss is bounded, and write plan.toml.

    Every answer is kept in DIR/answers.jsonl as it comes: after an interruption the same command goes on from there.
    Ends with code 0 and a plan, or with code 3 where no setting passed: then do not compress.
    """
    from fewer.tuning.dial import parted
    from fewer.tuning.dial import tune as search
    from fewer.tuning.examples import read
    from fewer.tuning.losses import resolve_loss
    from fewer_eval import environment, report

    tried = None if methods is None else listed(methods, "--methods")
    places = [("--out", folder / name) for name in ("report.html", "tuned.json", "answers.jsonl")]
    check_outputs(("--plan", plan), *places, read=[data, *(fit or ())], makes_folders=True)
    examples = read(data)  # before a model is loaded: most mistakes are here
    resolve_loss(measure)
    if unseen and any(one.images for one in examples):
        raise FewerError("--unseen is for texts: what is dropped of a picture is chosen with its question")
    parted(examples, loss, confidence, measure, seed)
    loaded, processor, host = _loaded(model, examples, max_new_tokens)
    if host is not None:
        model = "reference-vlm"
    with progress(44) as shown:
        bars: dict[str, Any] = {}

        def tick(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = shown.add_task(what, total=total)
            shown.update(bars[what], completed=done)

        found = search(
            loaded, examples, loss=loss, confidence=confidence, aim=aim.value,
            methods=tried, measure=measure, processor=processor,
            fit=fit or (), unseen=unseen, levels=levels, max_new_tokens=max_new_tokens, record=folder / "answers.jsonl",
            seed=seed, name=model, host=host, tick=tick,
        )  # fmt: skip
    found = replace(
        found, command=shlex.join(["fewer", *sys.argv[1:]]), hardware=environment.hardware(),
        versions={**environment.versions(), **found.versions},
    )  # fmt: skip
    try:
        plan.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        report.write(folder / "tuned.json", json.dumps(found.to_dict(), indent=1) + "\n")
        report.write_tuned(folder / "report.html", found)
    except OSError as why:
        raise FewerError(f"--out {folder}: cannot be written ({why.strerror})") from None
    if found.chosen is not None:
        found.plan().save(plan)
    if as_json:
        print_json(found.to_dict())
    else:
        out.print(report.tuned_table(found))
        out.print(found.promise, highlight=False, markup=False)
        wrote = f"{plan}, " if found.chosen is not None else ""
        out.print(f"wrote {wrote}{folder / 'report.html'} and {folder / 'tuned.json'}", highlight=False, markup=False)
    for note in found.notes:
        err.print(f"note: {note}", highlight=False, markup=False)
    if found.chosen is None:
        if plan.exists():
            err.print(f"{plan} is of an earlier run, and was left as it is", highlight=False, markup=False)
        raise typer.Exit(3)


def _loaded(name: str, examples: Any, most: int) -> tuple[Any, Any, Any]:
    """The model, its tokenizer or processor, and for the reference model who asks it."""
    if not any(one.images for one in examples):
        from fewer.models import load

        model, tokenizer = load(name, say=err.print)
        return model, tokenizer, None
    if name == "default":
        from fewer import reference_vlm, vision
        from fewer.tuning.pictures import Pictures

        pictured, processor = reference_vlm.load(say=err.print)
        err.print("reference model trained for this, not a general one: it knows the questions of docs/vlm.md only")
        host = Pictures(
            pictured, processor, most=most, write=reference_vlm.prompt,
            see=lambda picture: vision.square(picture, reference_vlm.SIDE),
        )  # fmt: skip
        return pictured, processor, host
    from fewer.cli.pictures import pictured as load_pictured

    model, processor = load_pictured(name)
    return model, processor, None
