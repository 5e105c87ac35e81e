"""The evidence for docs/kv.md: every cache method on the default model, in one command that can be interrupted.

    python scripts/evidence.py [--minutes 60] [--fit FILE ...]

Work is cut into units of a few samples. Each, when it is done, is merged into results/kv-smollm2.json, which names the
units that it holds, so a later call goes on where the last one stopped; docs/kv.svg and the tables of docs/kv.md are
made from it.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewer import fit as fits
from fewer import models
from fewer.methods import of_family, resolve
from fewer_eval import environment, report
from fewer_eval.runner import compare
from fewer_eval.schema import Row
from fewer_eval.tasks import TASKS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "kv-smollm2.json"
KEEPS = (0.75, 0.5, 0.25, 0.1)
MORE = ("kivi-2bit", "kivi-4bit", "snapkv+kivi-4bit", "keydiff+kivi-4bit", "kvzip+kivi-4bit")
"""Beside every registered method: bits and mixes."""


@dataclass(frozen=True)
class Unit:
    """A few samples of one task at one length; the seed tells it from the others of its kind."""

    task: str
    tokens: int
    samples: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task} {self.tokens} {self.samples} {self.seed}"


def plan() -> list[Unit]:
    """What is to be measured, what tells most first; kinds in one list take turns. Five needles to a unit: its samples
    lie at even depths from the start of a context to its end, and two would lie just there."""
    kinds = [[("needle-single", 1000, 5, 10), ("text", 1000, 6, 4)]]  # of running text a third of the samples
    kinds += [[("needle-single", tokens, 5, 4) for tokens in (2000, 4000)]]
    for task in ("needle-multikey", "needle-multivalue"):
        kinds += [[(task, 1000, 5, 10)], [(task, 2000, 5, 4), (task, 4000, 5, 4)]]
    kinds += [[("text", tokens, 6, 2) for tokens in (2000, 4000)]]
    return [
        Unit(task, tokens, size, seed)
        for turns in kinds
        for seed in range(10)
        for task, tokens, size, count in turns
        if seed < count
    ]


def methods(fit_files: list[Path]) -> list[Any]:
    """Every registered method, those that want a fit only where one is given, and the mixes."""
    given = {fit.method: fit for fit in map(fits.load, fit_files)}
    chosen: list[Any] = []
    for name, known in of_family("kv").items():
        if not fits.wants(known):
            chosen.append(name)
        elif name in given:
            chosen.append(known(fit=given[name]))
        else:
            print(f"left out, since it wants a --fit: {name}", file=sys.stderr)
    for name in MORE:
        for part in name.split("+"):
            resolve(part)
    return chosen + list(MORE)


def merged(rows: list[dict[str, Any]]) -> list[Row]:
    """One row for each cell: means over all samples; times are of the first unit alone, so the others may share a
    machine."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["task"], row["tokens"], row["question"], row["method"], str(row["keep_asked"])].append(row)
    out = []
    for group in cells.values():
        n = sum(row["n"] for row in group)
        mean = {
            name: sum(row[name] * row["n"] for row in group) / n
            for name, value in group[0].items()
            if isinstance(value, float) and name not in ("keep_asked", "prefill_s", "compress_s", "decode_ms")
        }
        out.append(Row(**{**group[0], **mean, "n": n, "seed": 0}))
    return out


def tables(rows: list[Row]) -> str:
    """What was found, in Markdown: one table for each task and length, a line for each method."""
    parts = []
    for task, tokens in dict.fromkeys((row.task, row.tokens) for row in sorted(rows, key=lambda r: (r.task, r.tokens))):
        mine = [row for row in rows if (row.task, row.tokens) == (task, tokens)]
        parts += [text_table(mine) if task == "text" else found_table(mine), losers(mine)]
    return "\n\n".join(parts)


def losers(rows: list[Row]) -> str:
    """Who does worse than random or evenly spaced tokens at the same keep, and where."""
    text = rows[0].task == "text"
    cell = {  # rounded: means of the same samples, taken in different orders, differ in the last digit
        (row.method, row.keep_asked, row.question): round(-(row.kl_bits or 0.0) if text else row.quality, 9)
        for row in rows
    }
    found: dict[str, list[str]] = defaultdict(list)
    for (name, keep, question), mine in cell.items():
        beaten = [each for each in ("random", "uniform") if mine < cell.get((each, keep, question), mine)]
        if name not in ("random", "uniform") and beaten:
            found[name].append(f"{keep}{'' if text else f' {question}'} ({', '.join(beaten)})")
    said = "; ".join(f"{name} at {', '.join(where)}" for name, where in sorted(found.items()))
    return f"Worse than random or evenly spaced tokens at the same keep: {said or 'none'}."


def found_table(rows: list[Row]) -> str:
    """Shares found, question unseen / seen, at every keep; methods that keep every token under the share they hold."""
    counts = sorted({row.n for row in rows})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    cell = {(row.method, row.keep_asked, row.question): row for row in rows}
    names = list(dict.fromkeys(row.method for row in rows))
    score = {
        name: sum(cell[name, keep, "unseen"].quality for keep in (0.25, 0.1) if (name, keep, "unseen") in cell)
        + 2 * sum(cell[name, 1.0, "unseen"].quality for _ in "x" if (name, 1.0, "unseen") in cell)
        for name in names
    }
    heads = [*(f"keep {keep}" for keep in KEEPS), "every token", "bytes at 0.25, or of all", "s"]
    lines = [
        f"**{rows[0].task}, {rows[0].tokens:,} tokens, n = {n}**", "",
        f"| method | {' | '.join(heads)} |",
        "|" + " --- |" * (len(KEEPS) + 4),
    ]  # fmt: skip

    def shown(name: str, keep: float) -> str:
        pair = [cell.get((name, keep, question)) for question in ("unseen", "seen")]
        return " / ".join("–" if row is None else f"{row.quality:.2f}" for row in pair) if any(pair) else ""

    for name in sorted(names, key=lambda name: -score[name]):
        one = next(cell[key] for key in [(name, k, "unseen") for k in (0.25, 1.0, *KEEPS)] if key in cell)
        figures = [shown(name, keep) for keep in (*KEEPS, 1.0)]
        share = f"{one.bytes_kept / one.bytes_full:.3f}"
        lines.append(f"| {name} | " + " | ".join(figures) + f" | {share} | {one.compress_s:.2f} |")
    return "\n".join(lines)


def text_table(rows: list[Row]) -> str:
    """Bits lost a token on running text, KL from the full cache, at every keep."""
    cell = {(row.method, row.keep_asked): row for row in rows}
    names = sorted({row.method for row in rows}, key=lambda name: (next(
        cell[name, k].kl_bits or 0.0 for k in (0.25, 1.0, *KEEPS) if (name, k) in cell
    ), name))  # fmt: skip
    n = min(row.n for row in rows)
    lines = [
        f"**running text, {rows[0].tokens:,} tokens, n = {n}: KL to the full cache, bits a token**", "",
        "| method | " + " | ".join(f"keep {keep}" for keep in KEEPS) + " | every token |",
        "|" + " --- |" * (len(KEEPS) + 2),
    ]  # fmt: skip
    for name in names:
        figures = [f"{cell[name, k].kl_bits:.3f}" if (name, k) in cell else "" for k in (*KEEPS, 1.0)]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def write(rows: list[Row], units: list[str], fit_files: list[Path], hardware: dict[str, str]) -> None:
    """`hardware`: what the times were taken on."""
    record = {
        "date": date.today().isoformat(), "model": "SmolLM2-135M-Instruct, float32", "hardware": hardware,
        "versions": environment.versions(), "fits": [path.name for path in fit_files], "units": units,
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=0) + "\n")
    partial.replace(RESULTS)
    page = ROOT / "docs" / "kv.md"
    before, _, rest = page.read_text().partition("<!-- evidence -->")
    _, _, after = rest.partition("<!-- /evidence -->")
    page.write_text(f"{before}<!-- evidence -->\n{tables(rows)}\n<!-- /evidence -->{after}")
    short = [row for row in rows if row.tokens == 1000 and row.task in ("needle-single", "text")]
    if short:
        report.svg_file(ROOT / "docs" / "kv.svg", short)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; the rest can wait")
    parser.add_argument("--fit", type=Path, action="append", default=[], help="a file that `fewer fit` made")
    options = parser.parse_args()
    end, chosen, units = time.monotonic() + 60 * options.minutes, methods(options.fit), plan()
    state = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"units": [], "rows": []}
    left = [unit for unit in units if unit.name not in state["units"]]
    model, tokenizer = models.load("default", say=print)
    columns = (TextColumn("{task.description:28s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(units), completed=len(units) - len(left))
        for unit in left:
            if time.monotonic() > end:
                break
            progress.update(bar, description=f"{unit.task}, {unit.tokens} tokens")
            found = compare(
                model, tokenizer, [TASKS[unit.task]], chosen, KEEPS, tokens=unit.tokens, samples=unit.samples,
                seed=unit.seed, model_name="default", timed=unit.seed == 0,
            )  # fmt: skip
            rows = merged([*state["rows"], *(row.to_dict() for row in found.rows)])
            hardware = environment.hardware() if unit.seed == 0 else state["hardware"]  # others are not timed
            state = {"hardware": hardware, "units": [*state["units"], unit.name], "rows": [r.to_dict() for r in rows]}
            write(rows, state["units"], options.fit, hardware)
            progress.advance(bar)
    print(
        f"{len(state['units'])} of {len(units)} units done; {len(state['rows'])} cells in {RESULTS.relative_to(ROOT)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
