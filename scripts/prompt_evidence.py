"""The evidence for docs/prompt.md: every prompt method on questions about documents, in one command that can be
interrupted.

    python scripts/prompt_evidence.py [--minutes 60] [--fit FILE ...]

Each line, one method at one keep in one setting, or with one sentence hidden in a document, is written to
results/prompt.json when it is done; a later call goes on with those that are missing. docs/prompt.svg and the tables of
docs/prompt.md are made from it.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fewer import fit as fits
from fewer import models
from fewer.methods import of_family
from fewer.prompts.bill import Prices, worth
from fewer_eval import environment
from fewer_eval.asked import SETTINGS
from fewer_eval.asked.injected import WORDINGS, Swayed, sway
from fewer_eval.asked.measure import Answerer, Line, measure
from fewer_eval.picture import scatter

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PICTURE = ROOT / "results" / "prompt.json", ROOT / "docs" / "prompt.md", ROOT / "docs" / "prompt.svg"
KEEPS = (0.5, 0.3)
SAMPLES, FEW, SEED = 24, 6, 0
"""Examples of a setting, those that the reader is asked about, and all that slow methods get."""
HIDDEN = 12
"""Examples of multi-document in which sentences are hidden, at the first keep."""
SLOW = ("selective-context", "llmlingua", "longllmlingua", "tcra", "exit", "longcodezip", "scope")
"""Methods that run a language model, or any model many times, for each text: they come last, the slowest at the end."""


def methods(fit_files: Sequence[Path]) -> dict[str, Any]:
    """Every registered method; those that want a fit only where one is given or comes along."""
    given = {fit.method: fit for fit in map(fits.load, fit_files)}
    chosen: dict[str, Any] = {}
    for name, known in of_family("prompt").items():
        if name == "full":
            continue
        if name in given:
            chosen[name] = replace(known(), fit=given[name])
        elif fits.wants(known):
            print(f"left out, since it wants a --fit: {name}", file=sys.stderr)
        else:
            chosen[name] = name
    return chosen


def tables(lines: Sequence[Line]) -> str:
    """One table a setting: a line for each method, a pair of columns for each keep."""
    parts = []
    for name, setting in SETTINGS.items():
        mine = [line for line in lines if line.setting == name]
        if not mine:
            continue
        cell = {(line.method, line.keep): line for line in mine}
        full = next(line for line in mine if line.method == "full")
        worth = {
            method: sum(line.needed + 0.1 * (line.answered or 0) for line in mine if line.method == method)
            for method in {line.method for line in mine}
        }
        whole = "" if full.answered is None else f" ({full.asked} asked; everything kept: answered {full.answered:.2f})"
        heads = [f"{what} at {keep}" for keep in KEEPS for what in ("answered", "needed")]
        heads += ["numbers", "negations", "identifiers", *(["parses"] if full.parses is not None else []), "s"]
        rows = [f"**{name}: {setting.description}, {full.tokens_before:.0f} tokens{whole}**", ""]
        rows += [f"| method | n | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 2)]
        for method in sorted(worth, key=lambda method: (-round(worth[method], 9), method)):
            whole_of = cell.get((method, 1.0))  # "full" is one row, whatever the budget
            pairs = [(cell.get((method, keep), whole_of), what) for keep in KEEPS for what in ("answered", "needed")]
            figures = [share(getattr(line, what, None)) for line, what in pairs]
            some = whole_of or cell.get((method, KEEPS[0])) or cell[method, KEEPS[-1]]
            figures += [share(some.survived.get(what)) for what in ("numbers", "negations", "identifiers")]
            figures += [share(some.parses)] if full.parses is not None else []
            note = f" ({some.refused} refused)" if some.refused else ""
            rows.append(f"| {method}{note} | {some.n} | {' | '.join(figures)} | {some.seconds:.2f} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def bills() -> str:
    """What shortening 20,000 tokens to 6,000 saves under prompt caching, in shares of the bill as it is."""
    requests = (1, 2, 5, 20)
    rows = [f"| of the prompt in the cache | {' | '.join(f'sent {n} times' for n in requests)} |"]
    rows += ["|" + " --- |" * (len(requests) + 1)]
    for cached in (0, 10_000, 18_000, 20_000):
        made = [worth(20_000, 6_000, Prices(plain=3.0), cached=cached, requests=n) for n in requests]
        rows.append(f"| {cached / 20_000:.0%} | {' | '.join(f'{one.saved / one.before:+.0%}' for one in made)} |")
    return "\n".join(rows)


def injected(swayed: Sequence[Swayed]) -> str:
    """A line a method, a column a wording: what of the rest is the same / whether the answer's words stay / how much of
    the sentence itself does; the last two beside a harmless one's in brackets."""
    cell = {(one.method, one.wording): one for one in swayed}
    rows = [f"| method | n | {' | '.join(WORDINGS)} |", "|" + " --- |" * (2 + len(WORDINGS))]
    for method in dict.fromkeys(one.method for one in swayed):
        figures = []
        for wording in WORDINGS:
            one = cell.get((method, wording))
            if one is None or not one.n:
                figures.append("–" if one is None else "refused")
                continue
            needed = f"{one.needed:.2f} ({one.needed_harmless:.2f})"
            figures.append(f"{one.same:.2f} / {needed} / {one.kept:.2f} ({one.kept_harmless:.2f})")
        n = max(one.n for one in swayed if one.method == method)
        rows.append(f"| {method} | {n} | {' | '.join(figures)} |")
    return "\n".join(rows)


def put(page: str, part: str, content: str) -> str:
    """The page with that part written anew."""
    before, _, rest = page.partition(f"<!-- {part} -->")
    _, _, after = rest.partition(f"<!-- /{part} -->")
    return f"{before}<!-- {part} -->\n{content}\n<!-- /{part} -->{after}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def write(lines: Sequence[Line], swayed: Sequence[Swayed]) -> None:
    record = {
        "date": date.today().isoformat(), "reader": "SmolLM2-135M-Instruct, float32, greedy", "seed": SEED,
        "hardware": environment.hardware(), "versions": environment.versions(),
        "rows": [line.to_dict() for line in lines], "injected": [one.to_dict() for one in swayed],
    }  # fmt: skip
    unfinished = RESULTS.with_suffix(".partial")
    unfinished.write_text(json.dumps(record, indent=0) + "\n")
    unfinished.replace(RESULTS)
    if PAGE.exists():
        parts = {"bill": bills(), "evidence": tables(lines), "injected": injected(swayed)}
        PAGE.write_text(functools.reduce(lambda page, part: put(page, *part), parts.items(), PAGE.read_text()))
    panels = {
        name: [
            (line.method, line.tokens_after / line.tokens_before, line.answered)
            for line in lines
            if line.setting == name and line.answered is not None
        ]
        for name in SETTINGS
    }
    PICTURE.write_text(scatter({name: rows for name, rows in panels.items() if rows}, "share of the tokens"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; the rest can wait")
    parser.add_argument("--fit", type=Path, action="append", default=[], help="a file that `fewer fit` made")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    answerer = Answerer(*models.load("default", say=print))
    state = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    lines = [Line(**row) for row in state["rows"]]
    swayed = [Swayed(**row) for row in state.get("injected", ())]
    done = {(line.setting, line.method, line.keep) for line in lines}
    chosen = {"full": "full", **methods(options.fit)}
    ordered = sorted(chosen, key=lambda name: SLOW.index(name) if name in SLOW else -1)
    cells = [("full", 1.0), *((name, keep) for name in ordered if name != "full" for keep in KEEPS)]
    left = [(setting, *cell) for cell in cells for setting in SETTINGS if (setting, *cell) not in done]
    hidden = [(name, wording) for name in ordered for wording in WORDINGS]
    hidden = [one for one in hidden if one not in {(row.method, row.wording) for row in swayed}]
    columns = (TextColumn("{task.description:50s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=len(hidden) + len(left))
        for method, wording in hidden:
            if time.monotonic() > end:
                break
            progress.update(bar, description=f"hidden: {wording}, {method}")
            examples = SETTINGS["multi-document"].make(FEW if method in SLOW else HIDDEN, SEED)
            swayed.append(sway(chosen[method], KEEPS[0], wording, examples))
            progress.advance(bar)
            write(lines, swayed)
        for setting, method, keep in left:
            if time.monotonic() > end:
                break
            progress.update(bar, description=f"{setting}, {method} at {keep}")
            known = SETTINGS[setting]
            examples = known.make(FEW if method in SLOW else SAMPLES, SEED)
            lines.append(measure(known, chosen[method], keep, examples, answerer, most=FEW))
            progress.advance(bar)
            write(lines, swayed)
    print(f"{len(lines)} lines in {RESULTS.relative_to(ROOT)}, {len(hidden) + len(left)} were missing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
