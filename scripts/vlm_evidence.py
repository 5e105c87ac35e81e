"""The evidence for docs/vlm.md: every method for visual tokens on the reference model (trained for this, not a general
one), in one command that can be interrupted.

    python scripts/vlm_evidence.py [--part answers|batches] [--minutes 60] [--share 0/2]

Each line, one method at one keep on one task, is written to results/vlm.json when it is done; a later call goes on with
those that are missing. docs/vlm.svg and the tables of docs/vlm.md are made from it. `--share i/n` takes every n-th
method only, for n calls side by side; each writes a file of its own, that the next call without it takes in. The part
"batches", the same prompts in padded batches and one by one, is kept under a key of its own.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewer import reference_vlm
from fewer.adapters.vlm_stages import places
from fewer.methods import METHODS, of_family
from fewer_eval import environment
from fewer_eval.looking import TASKS
from fewer_eval.looking.batches import SIZE, Batched, asking, compare, mixed
from fewer_eval.looking.measure import TURN, Answerer, Line
from fewer_eval.picture import scatter

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = ROOT / "results" / "vlm.json", ROOT / "docs" / "vlm.md", ROOT / "docs" / "vlm.svg"
GRADES = ROOT / "results" / "reference-vlm.json"
KEEPS = (64, 32, 128, 16)
"""Visual tokens kept of 256, in the order in which they are measured."""
SAMPLES = 30
BATCHED = 3 * SIZE
"""Prompts a method that are asked in batches and one by one."""
VIDEO = ("evs", "dycoke")
TOWER = ("turbo", "tome")
GROUPS = {
    "where": ("cell", "beside", "row", "column", "cell-of"),
    "what": ("colour", "count", "kind", "holds", "more"),
    "reading": ("number", "word"),
    "second turn": (TURN,),
}


COLUMNS = (TextColumn("{task.description:50s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def tasks() -> list[str]:
    """Those at which the model clearly beats its blind self, see results/reference-vlm.json."""
    used = [grade["task"] for grade in json.loads(GRADES.read_text())["tasks"] if grade["used"]]
    return [name for name in (*TASKS, TURN) if name in used]


Cell = tuple[str, int, str, str]
"""A method, its keep, how that is counted, and the way of positions."""
MOVED = (
    ("divprune", "compact"),
    ("random", "compact"),
    ("uniform", "compact"),
    ("visual-pooling", "compact"),
    ("visual-pooling", "centroid"),
)
"""What is measured with other positions than the old ones, at the first keep."""


def cells(depth: int) -> list[Cell]:
    """Every method at every keep; those that cut late also with keep as the mean over the layers."""
    chosen = [name for name in (*of_family("vlm"), *TOWER) if name not in ("full", *VIDEO)]
    late = [name for name in chosen if name in of_family("vlm") and max(places(METHODS[name](), depth)) >= 0]
    out = [("full", 256, "last", "keep"), *((name, KEEPS[0], "last", way) for name, way in MOVED)]
    for keep in KEEPS:
        out += [(name, keep, "last", "keep") for name in chosen] + [(name, keep, "mean", "keep") for name in late]
    return out


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def tables(lines: Sequence[Line]) -> str:
    """A table a budget: lines are methods, best first; columns are groups of tasks."""
    parts = []
    lines = [one for one in lines if one.positions == "keep"]
    for counted in ("last", "mean"):
        for keep in sorted(KEEPS, reverse=True):
            mine = [one for one in lines if one.method == "full" or (one.keep, one.counted) == (keep, counted)]
            if counted == "mean":  # methods that cut before the first layer have one row for both
                early = {one.method for one in lines if one.counted == "last"}
                late = {one.method for one in lines if one.counted == "mean"}
                mine += [o for o in lines if (o.keep, o.counted) == (keep, "last") and o.method in early - late]
            methods = list(dict.fromkeys(one.method for one in mine))  # ties stay in the order of the file
            if len(methods) < 2:
                continue
            rows = []
            for method in methods:
                own = {one.task: one for one in mine if one.method == method}
                good = [one for one in own.values() if not one.error]
                if not good:
                    rows.append(
                        (-1.0, f"| {method} | refused: {next(iter(own.values())).error.split(':')[0]} |" + " |" * 7)
                    )
                    continue
                groups = []
                for names in GROUPS.values():
                    some = [own[name].right for name in names if name in own and not own[name].error]
                    groups.append(fmean(some) if some else None)
                mean = fmean(one.right for one in good)
                seen = [one.seen for one in good if one.seen is not None]
                figures = [share(one) for one in (mean, *groups, fmean(one.loyal for one in good))]
                figures += [share(fmean(seen) if seen else None), f"{fmean(one.mean for one in good):.0f}"]
                rows.append((mean, f"| {method} | {' | '.join(figures)} |"))
            what = "left at the end" if counted == "last" else "a layer on average"
            head = ["method", "all", *GROUPS, "loyal", "region", "read a layer"]
            parts.append(
                "\n".join(
                    [f"**{keep} of 256 tokens {what}**", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
                    + [row for _, row in sorted(rows, key=lambda row: -row[0])]
                )
            )
    return "\n\n".join(parts)


def moved(lines: Sequence[Line]) -> str:
    """The same tokens with other positions."""
    rows = [f"| method at {KEEPS[0]} | positions | all | {' | '.join(GROUPS)} |", "|" + " --- |" * (3 + len(GROUPS))]
    for method in ("full", *dict.fromkeys(name for name, _ in MOVED)):
        keep = 256 if method == "full" else KEEPS[0]
        for way in ("keep", "compact", "centroid"):
            own = {
                one.task: one for one in lines
                if (one.method, one.keep, one.counted, one.positions) == (method, keep, "last", way)
            }  # fmt: skip
            if own:
                groups = [[own[name].right for name in names if name in own] for names in GROUPS.values()]
                figures = [fmean(one.right for one in own.values()), *(fmean(g) if g else None for g in groups)]
                rows.append(f"| {method} | {way} | {' | '.join(map(share, figures))} |")
    return "\n".join(rows)


def grades() -> str:
    """How well the model answers with all tokens, and how well without seeing, from results/reference-vlm.json."""
    rows = ["| task | all tokens | blind | most frequent answer | held out |", "| --- | --- | --- | --- | --- |"]
    for one in json.loads(GRADES.read_text())["tasks"]:
        figures = " | ".join(share(one[name]) for name in ("full", "blind", "majority"))
        rows.append(f"| {one['task']} | {figures} | {one['split']} |")
    return "\n".join(rows)


def batched(rows: Sequence[Batched]) -> str:
    """Batches with padding beside the same prompts one by one."""
    head = ["method", "same answers", "same tokens", "as many tokens", "logits apart"]
    out = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for one in rows:
        if one.error:
            out.append(f"| {one.method} | refused: {one.error.split(':')[0]} |" + " |" * (len(head) - 2))
            continue
        chosen = "–" if one.method == "full" else share(one.chosen)
        counts = "–" if one.method == "full" else "yes" if one.counts else "no"
        figures = [share(one.same), chosen, counts, f"{one.apart:.1e}"]
        out.append(f"| {one.method} | {' | '.join(figures)} |")
    return "\n".join(out)


def panels(lines: Sequence[Line]) -> dict[str, list[tuple[str, float, float]]]:
    """Share answered right against visual tokens a layer, a panel for each group of tasks."""
    out: dict[str, list[tuple[str, float, float]]] = {}
    lines = [one for one in lines if one.positions == "keep"]
    for title, names in GROUPS.items():
        points = []
        for method, keep in dict.fromkeys((one.method, one.keep) for one in lines if one.counted == "last"):
            some = [
                one for one in lines
                if (one.method, one.keep, one.counted) == (method, keep, "last") and one.task in names and not one.error
            ]  # fmt: skip
            if some:
                points.append((method, fmean(one.mean for one in some), fmean(one.right for one in some)))
        if points:
            out[title] = points
    return out


def put(page: str, part: str, content: str) -> str:
    """The page with that part written anew."""
    before, _, rest = page.partition(f"<!-- {part} -->")
    _, _, after = rest.partition(f"<!-- /{part} -->")
    return f"{before}<!-- {part} -->\n{content}\n<!-- /{part} -->{after}"


def written() -> dict[str, Any]:
    """When, where and with what something was measured."""
    return {"date": date.today().isoformat(), "hardware": environment.hardware(), "versions": environment.versions()}


def held(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def write(record: dict[str, Any], path: Path) -> None:
    """Put these keys into the file; the others stay."""
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(held(path) | record, indent=0) + "\n")
    unfinished.replace(path)


def write_lines(lines: Sequence[Line], path: Path) -> None:
    of = {"model": "reference model trained for this, not a general one", "samples": "held out, seeds from 0"}
    write({**written(), **of, "rows": [line.to_dict() for line in lines]}, path)


def publish() -> None:
    """The tables and the picture, from all there is."""
    lines, rows = read(RESULTS), read_batched()
    if PAGE.exists():
        page = put(put(PAGE.read_text(), "model", grades()), "evidence", tables(lines))
        PAGE.write_text(put(put(page, "moved", moved(lines)), "batches", batched(rows)))
    PICTURE.write_text(scatter(panels(lines), "visual tokens a layer"))


def read(path: Path) -> list[Line]:
    return [Line(**row) for row in held(path).get("rows", [])]


def read_batched() -> list[Batched]:
    return [Batched(**row) for row in held(RESULTS).get("batches", {}).get("rows", [])]


def ask_in_batches(model: Any, processor: Any, end: float) -> None:
    """Every method that the other part covers, at its first keep; what is there is not measured again."""
    known = {one.method: one for one in read_batched()}
    names = dict.fromkeys(name for name, *_ in cells(model.config.text_config.num_hidden_layers))
    prompts = mixed([name for name in tasks() if name != TURN], BATCHED)
    with Progress(*COLUMNS) as progress:
        left = [name for name in names if name not in known]
        bar = progress.add_task("", total=len(left))
        for name in left:
            if time.monotonic() > end:
                break
            progress.update(bar, description=f"{name} in batches of {SIZE}")
            keep = 256 if name == "full" else KEEPS[0]
            known[name] = compare(asking(model, processor, name, keep), prompts, name, keep)
            progress.advance(bar)
            rows = [known[one].to_dict() for one in names if one in known]
            write({"batches": {**written(), "size": SIZE, "rows": rows}}, RESULTS)


def answer(answerer: Answerer, end: float, turn: int, turns: int) -> None:
    """Every method, keep and task that is missing."""
    path = RESULTS if turns == 1 else RESULTS.with_name(f"vlm.share-{turn}.json")
    lines = read(RESULTS)
    for other in sorted(RESULTS.parent.glob("vlm.share-*.json")):
        if turns == 1 or other == path:
            lines += read(other)
    known: dict[Any, Line] = {(one.task, one.method, one.keep, one.counted, one.positions): one for one in lines}
    every = cells(answerer.model.config.text_config.num_hidden_layers)
    order = list(dict.fromkeys(name for name, *_ in every))
    mine = [cell for cell in every if order.index(cell[0]) % turns == turn]
    left = [(task, *cell) for cell in mine for task in tasks() if (task, *cell) not in known]
    with Progress(*COLUMNS) as progress:
        bar = progress.add_task("", total=len(left))
        for task, method, keep, counted, way in left:
            if time.monotonic() > end:
                break
            progress.update(bar, description=f"{task}, {method} at {keep} ({counted}, {way})")
            if task == TURN and (method in TOWER or method == "downsampled-image"):
                line = Line(task, method, keep, counted, 0, error="measured on one turn only")
            else:
                line = answerer.measure(task, method, keep, counted, SAMPLES, way)
            known[task, method, keep, counted, way] = line
            progress.advance(bar)
            write_lines(list(known.values()), path)
    if turns == 1:
        write_lines(list(known.values()), RESULTS)
        for other in RESULTS.parent.glob("vlm.share-*.json"):
            other.unlink()
    print(f"{len(known)} lines, {len(left)} were missing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("answers", "batches"), help="what to measure; both, if left out")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; the rest can wait")
    parser.add_argument("--share", default="0/1", help="of the answers, every n-th method only, as in 0/2")
    options = parser.parse_args()
    turn, turns = map(int, options.share.split("/"))
    if options.part == "batches" and turns > 1:
        parser.error("--share is for the answers: batches are measured in one call")
    end = time.monotonic() + 60 * options.minutes
    model, processor = reference_vlm.load(say=print)
    if options.part != "batches":
        answer(Answerer(model, processor), end, turn, turns)
    if options.part != "answers" and turns == 1:
        ask_in_batches(model, processor, end)
    if turns == 1:
        publish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
