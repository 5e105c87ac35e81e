"""Turns the rows of an evaluation into a table, a summary, one HTML page and a file of JSON lines.

What was not measured is an en dash in a table and absent from a picture, never 0.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from fewer_eval.heat import heat_picture, uneven
from fewer_eval.lines import ASKED, DASH, Line, best_of, budget, lines_of, losers_of, quality_of, random_at
from fewer_eval.page import megabytes, number, write_page
from fewer_eval.page import write as write
from fewer_eval.picture import kept_picture, picture
from fewer_eval.schema import Lost, Question, Row, RunInfo
from fewer_eval.tuned import heads_of
from fewer_eval.tuned import tuned_table as tuned_table
from fewer_eval.tuned import write_tuned as write_tuned


@dataclass(frozen=True)
class _Column:
    title: str
    text: Callable[[Line], str]
    bar: bool = False


def table(rows: Sequence[Row]) -> Table:
    """One line per method and budget: full first, then each budget with its best method (question unseen) on top."""
    head, *body = cells(rows)
    result = Table(*head)
    for column in result.columns[1:]:
        column.justify = "right"
    last = ""
    for row in body:
        if last not in ("", row[1]):
            result.add_section()
        last = row[1]
        result.add_row(*map(Text, row))  # Text, not str: rich would read square brackets in a name as markup
    return result


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its head first."""
    head = ["method", "keep asked", *(column.title for column in _COLUMNS)]
    return [head, *([line.method, line.keep, *(column.text(line) for column in _COLUMNS)] for line in lines_of(rows))]


def summary(rows: Sequence[Row]) -> str:
    """Two plain sentences: the best method at each budget with the question unseen, and who lost to random."""
    lines = [line for line in lines_of(rows) if line.mean("quality", "unseen") is not None]
    if not lines:
        return "Quality with the question unseen was not measured. So no method can be held against random selection."
    best, random = best_of(lines), random_at(lines)
    top = [f"{quality_of(group[0]):.3f} at keep {keep} ({_join(group)})" for keep, group in best.items()]
    full = [f"the full cache scores {quality_of(line):.3f}" for line in lines if line.method == "full"]
    first = "the best mean quality is " + ", ".join(top) if top else "no method was measured"
    first = "; ".join([first, *full])
    lost = [
        f"{_join(group, scores=True)} at keep {keep} (random {random[keep]:.3f})"
        for keep, group in groupby(losers_of(lines), key=lambda line: line.keep)
    ]
    second = f"Worse than random selection: {'; '.join(lost)}" if lost else "No method falls below random selection"
    unknown = [keep for keep in best if keep not in random and keep != "1.0"]  # where everything stays
    if unknown and not random:
        second = "Random selection was not measured, so no method can be held against it"
    elif unknown:
        second += f"; random selection was not measured at keep {', '.join(unknown)}"
    return f"With the question unseen, {first}. {second}."


def svg_file(path: str | Path, rows: Sequence[Row]) -> None:
    """Write the picture as a file of its own, for documentation."""
    write(path, picture(rows))


def write_html(path: str | Path, rows: Sequence[Row], info: RunInfo) -> None:
    """Write the whole report as one page that asks nothing of the network."""
    lines = lines_of(rows)
    best = {line for top in best_of(lines).values() for line in top}
    losers = set(losers_of(lines))
    asked = {(row.task, row.question) for row in rows if row.question != "none"}
    maps = uneven(info.kept)
    write_page(
        path,
        "report.html.j2",
        info=info,
        run=info,
        unhurt=[name for name, examples in info.worst.items() if not examples],
        summary=summary(rows),
        picture=Markup(picture(rows)),  # noqa: S704 - our own SVG, names escaped by matplotlib
        kept_picture=Markup(kept_picture(info.kept)) if info.kept else "",  # noqa: S704 - as above
        columns=_COLUMNS,
        groups=[list(group) for _, group in groupby(lines, key=lambda line: line.keep)],
        best=best,
        losers=losers,
        tasks={task: [kind for kind in ASKED if (task, kind) in asked] for task in sorted({task for task, _ in asked})},
        task_quality=_task_quality,
        budget=budget,
        heat=Markup(heat_picture(maps, "entries kept")) if maps else "",  # noqa: S704 - as above
        flat=[name for name in info.kept if name not in maps],
        maps={name: heads_of(layers) for name, layers in maps.items()},
        depth=max(map(len, info.kept.values()), default=0),
        error=_standard_error(lines),
    )


def write_jsonl(path: str | Path, rows: Sequence[Row], info: RunInfo) -> None:
    """Write the run on the first line (with its number of rows, so that a cut file is noticed), then a row a line."""
    lines_of(rows)
    records = [{"kind": "run", "rows": len(rows), **info.to_dict()}]
    records += [{"kind": "row", **row.to_dict()} for row in rows]
    text = ""
    for at, record in enumerate(records, start=1):
        try:
            # JSON knows no NaN: a file that only Python could read would be no record.
            text += json.dumps(record, allow_nan=False) + "\n"
        except ValueError as error:
            raise ValueError(f"{path}, line {at}: cannot write {record} ({error})") from error
    write(path, text)


def read_jsonl(path: str | Path) -> tuple[list[Row], RunInfo]:
    """Read back what `write_jsonl` wrote; anything else is a ValueError that names the file and the line."""
    rows: list[Row] = []
    info: RunInfo | None = None
    expected = number = 0
    with Path(path).open("rb") as file:
        for number, text in enumerate(file, start=1):
            try:
                record = json.loads(text)
                kind = record.pop("kind")
                if kind != ("row" if info else "run"):
                    raise ValueError(f"kind {kind!r} is out of place")
                if info:
                    rows.append(Row(**record))
                else:
                    expected = record.pop("rows")
                    worst = {name: [Lost(**one) for one in some] for name, some in record.pop("worst", {}).items()}
                    info = RunInfo(**{**record, "notes": tuple(record["notes"]), "worst": worst})
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not a line of an evaluation file ({error})") from error
    if info is None or len(rows) != expected:
        raise ValueError(f"{path}, line {number}: the file ends after {len(rows)} rows, {expected or 'some'} were due")
    return rows, info


def _standard_error(lines: Sequence[Line]) -> float | None:
    """The largest standard error that any mean quality here can have: a score in [0, 1] has a variance below 1/4."""
    bounds = []
    for line in lines:
        for question in ASKED:
            counts: dict[str, int] = defaultdict(int)
            for row in line.rows:
                if row.question == question:
                    counts[row.task] += row.n
            if line.mean("quality", question) is not None:
                bounds.append(math.sqrt(sum(0.25 / n for n in counts.values())) / len(counts))
    return max(bounds, default=None)


def _join(lines: Iterable[Line], scores: bool = False) -> str:
    return ", ".join(f"{line.method} {quality_of(line):.3f}" if scores else line.method for line in lines)


_COLUMNS = (
    _Column("keep got", lambda line: number(line.mean("keep_got"))),
    _Column(
        "cache MB (kept / full)",
        lambda line: f"{megabytes(line.mean('bytes_kept'))} / {megabytes(line.mean('bytes_full'))}",
    ),
    _Column("quality, question unseen", lambda line: number(line.mean("quality", "unseen")), bar=True),
    _Column("quality, question seen", lambda line: number(line.mean("quality", "seen")), bar=True),
    _Column("loyalty (unseen)", lambda line: number(line.mean("loyalty", "unseen")), bar=True),
    _Column("KL, bits a token", lambda line: number(line.mean("kl_bits", "none"))),
    _Column("loss, bits a byte", lambda line: number(line.mean("bpb_diff", "none"))),
    _Column("compress s", lambda line: number(line.mean("compress_s"))),
    _Column("decode ms", lambda line: number(line.mean("decode_ms"), 1)),
    _Column("n", lambda line: line.samples),
)


def _task_quality(line: Line, task: str, question: Question) -> str:
    found = [row.quality for row in line.rows if (row.task, row.question) == (task, question)]
    return number(fmean(found)) if found else DASH
