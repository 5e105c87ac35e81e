"""`fewer compare` and `fewer generate`: methods for caches, measured and used."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewer import fit as fits
from fewer.cli.common import (
    Json,
    ModelName,
    check_outputs,
    err,
    listed,
    out,
    print_json,
    print_text,
    progress,
    read_keep,
    read_text,
    refuse_empty,
)
from fewer.compress import compress
from fewer.methods import of_family, resolve, resolve_store
from fewer.methods.any.full import Full
from fewer.tuning.planfile import TunedPlan
from fewer.types import Budget, FewerError, Keep, UnknownName

if TYPE_CHECKING:
    from fewer.report import Report
    from fewer_eval.tasks import Task

Fits = Annotated[list[Path] | None, typer.Option("--fit", help="A file that `fewer fit` made for one of the methods.")]


def compare(
    methods: Annotated[
        str, typer.Option(help="Names, comma-separated, or 'all'; with a store as in snapkv+kivi-4bit.")
    ] = "all",
    keep: Annotated[str, typer.Option(help="Budgets, comma-separated: fractions, token counts or bytes.")] = "0.5,0.25",
    tasks: Annotated[str, typer.Option(help="Names, comma-separated, or 'all'.")] = "needle-single,text",
    tokens: Annotated[int, typer.Option(help="Length of a context in tokens.", min=64)] = 1000,
    samples: Annotated[
        int | None,
        typer.Option(help="Of each task, default 20 (of running text a third); with --data, default all.", min=1),
    ] = None,
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(help="Your own JSONL of context, question, answer, as the task.")] = None,
    unseen: Annotated[bool, typer.Option(help="With --data: hide the question from the compressor.")] = False,
    fit: Fits = None,
    folder: Annotated[Path, typer.Option("--out", help="Where report.html and results.jsonl go.")] = Path("out"),
    model: ModelName = "default",
    as_json: Json = False,
) -> None:
    """Measure what methods save and lose on a model: a table, DIR/report.html and DIR/results.jsonl."""
    from fewer.tuning.examples import read
    from fewer_eval import tasks as known
    from fewer_eval.schema import Question

    places = [("--out", folder / name) for name in ("report.html", "results.jsonl")]
    check_outputs(*places, read=[data, *(fit or ())], makes_folders=True)
    chosen = fitted(listed(methods, "--methods"), fit)
    keeps = [read_keep(text) for text in listed(keep, "--keep")]
    own = None if data is None else known.from_jsonl(data)
    run = [own] if own is not None else _tasks(tasks)
    if unseen and own is None:
        raise FewerError("--unseen goes with --data; the built-in tasks are measured both ways")
    questions: tuple[Question, ...] = ("unseen", "seen") if own is None else ("unseen",) if unseen else ("seen",)
    many = samples or (20 if data is None else len(read(data)))
    _compare(model, run, chosen, keeps, tokens, many, seed, questions, folder, as_json)


def _compare(
    model_name: str, tasks: "list[Task]", chosen: list[Any], keeps: list[Keep], tokens: int, samples: int, seed: int,
    questions: Any, folder: Path, as_json: bool,
) -> None:  # fmt: skip
    from datetime import date

    from fewer.models import load
    from fewer_eval import environment, report
    from fewer_eval.runner import compare, samples_of
    from fewer_eval.schema import RunInfo

    model, tokenizer = load(model_name, say=err.print)
    total = sum(samples_of(task, samples) for task in tasks)
    with progress(24) as shown:
        bar, started = shown.add_task("loading", total=total), [False]

        def tick(what: str) -> None:
            shown.update(bar, description=what, advance=int(started[0]))
            started[0] = True

        done = compare(
            model, tokenizer, tasks, chosen, keeps, tokens=tokens, samples=samples, seed=seed, questions=questions,
            model_name=model_name, tick=tick,
        )  # fmt: skip
        shown.update(bar, description="done", completed=total)
    info = RunInfo(
        model=model_name, command=" ".join(["fewer", *sys.argv[1:]]), date=date.today().isoformat(), seed=seed,
        tokens=tokens, samples=samples, hardware=environment.hardware(), versions=environment.versions(),
        kept=done.kept, notes=done.notes, worst=done.worst,
    )  # fmt: skip
    if as_json:  # first, so that it is not lost with a disk that has filled up
        print_json({"rows": [row.to_dict() for row in done.rows]})
    else:
        out.print(report.table(done.rows))
        out.print(report.summary(done.rows), highlight=False)
    try:
        report.write_html(folder / "report.html", done.rows, info)
        report.write_jsonl(folder / "results.jsonl", done.rows, info)
    except OSError as why:
        raise FewerError(f"--out {folder} cannot be written: {why.strerror}") from None
    if not as_json:
        out.print(f"wrote {folder / 'report.html'} and {folder / 'results.jsonl'}", highlight=False)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --file.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file ('-' is standard input).")] = None,
    method: Annotated[str | None, typer.Option(help="How the cache is shortened; default snapkv.")] = None,
    keep: Annotated[str | None, typer.Option(help="What stays of the cache; default 0.25.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A plan that `fewer tune` wrote, in their place.")] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about the prompt, which is its context.")] = None,
    when: Annotated[str | None, typer.Option(help="Compress at 'prefill', 'decode' or 'both'.")] = None,
    every: Annotated[int | None, typer.Option(help="Decoding steps between two compressions.")] = None,
    store: Annotated[str | None, typer.Option(help="How what is kept is held, such as kivi-4bit.")] = None,
    fit: Fits = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of the answer; default 128, with --plan what it was measured with.")
    ] = None,
    plain: Annotated[bool, typer.Option(help="Do not wrap the prompt in the model's chat template.")] = False,
    model: Annotated[
        str | None, typer.Option(help="A path, a hub name, or 'default'; with --plan, the plan's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt from a compressed cache; the text goes to stdout, the report to stderr."""
    import torch

    from fewer.models import load

    text = _prompt(prompt, file)
    refuse_empty({"--method": method, "--keep": keep, "--question": question, "--store": store, "--model": model})
    if plan is not None:
        given = {
            "method": method, "keep": keep, "when": when, "every": every, "store": store, "fit": fit or None,
            "plain": plain or None,
        }  # fmt: skip
        if extra := [name for name, value in given.items() if value is not None]:
            raise FewerError(f"--plan {plan} says all of it; leave out --{', --'.join(extra)}")
        _by_plan(plan, text, question, max_new_tokens, model, as_json)
        return
    chosen, budget = _asked("snapkv" if method is None else method, keep, when, every, store, fit)
    loaded, tokenizer = load(model or "default", say=err.print)
    if question is not None:
        text = f"{text}\n\n{question}"
    if not plain and tokenizer.chat_template is not None:
        message = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=plain)
    with torch.inference_mode(), compress(loaded, chosen, budget, when=when, every=every, store=store) as run:
        run_model: Any = loaded.generate  # its type is lost behind the model class's attributes
        tokens = run_model(**ids, max_new_tokens=max_new_tokens or 128, do_sample=False)
    answer = str(tokenizer.decode(tokens[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    _say(answer, run.report, as_json)


def _asked(
    name: str, keep: str | None, when: str | None, every: int | None, store: str | None, fit: list[Path] | None
) -> tuple[Any, Keep]:
    """The method and the budget; what is wrong with them, or with the rest, is said before a model is loaded."""
    from fewer.adapters.hf_policy import Policy

    if name.endswith(".toml"):
        raise FewerError(f"--method {name}: give a plan by --plan {name}, without --method and --keep")
    if "+" in name:
        first, _, second = name.partition("+")
        raise FewerError(f"--method {name}: give the store by itself, --method {first} --store {second}")
    (method,) = fitted([name], fit)
    if isinstance(method, Full) and keep is None:
        keep = "1.0"
    budget = read_keep("0.25" if keep is None else keep)
    if isinstance(method, Full) and budget != 1:
        raise FewerError(f"--keep {keep}: full keeps everything; leave it out, or name another --method")
    policy = Policy.of(method, Budget.parse(budget), when, every, resolve_store(store))
    if every is not None and policy.when == "prefill":
        raise FewerError(f"--every {every}: {name} compresses after the prompt alone; add --when decode, or both")
    return method, budget


def _by_plan(
    path: Path, context: str, question: str | None, most: int | None, model: str | None, as_json: bool
) -> None:
    """Answer as the plan was measured: a context and a question, greedily, and what is compressed in its order."""
    from fewer.models import load
    from fewer.tuning.texts import Texts

    plan = TunedPlan.load(path)
    if question is None or not question.strip():
        raise FewerError(f"--plan {path} was measured on questions about contexts: give --question too")
    loaded, tokenizer = load(model or plan.model or "default", say=err.print)
    plan.check(loaded)
    promise = plan.promise
    length = most or (128 if promise is None else promise.max_new_tokens)
    host = Texts(loaded, tokenizer, most=length, unseen=promise is not None and promise.unseen)
    short, _ = host.shorten(plan.setting, context, question)
    answer, report = host.in_line(plan.setting.held, *host.asker.prompt(short, question))
    _say(answer.text, report, as_json)
    if not as_json:
        err.print(str(plan), highlight=False, markup=False)
        if promise is not None and length > promise.max_new_tokens:
            err.print(f"the promise is for answers of at most {promise.max_new_tokens} tokens", style="red")


def _say(answer: str, report: "Report", as_json: bool) -> None:
    if as_json:
        print_json({"text": answer, "report": report.to_dict()})
        return
    print_text(answer)
    err.print(str(report), highlight=False, markup=False)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise FewerError("give a prompt, or --file, and not both")
    if prompt is None:
        assert file is not None
        prompt = read_text(file, "--file")
    if not prompt.strip():
        raise FewerError("the prompt is empty")
    return prompt


def fitted(names: list[str], files: list[Path] | None) -> list[Any]:
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


def _tasks(text: str) -> "list[Task]":
    from difflib import get_close_matches

    from fewer_eval.tasks import TASKS

    names = list(TASKS) if text == "all" else listed(text, "--tasks")
    for name in names:
        if name not in TASKS:
            near = " or ".join(get_close_matches(name, TASKS, n=3)) or "one of them"
            raise UnknownName(f"--tasks {name!r}: did you mean {near}? Known are {', '.join(TASKS)}")
    return [TASKS[name] for name in names]
