"""Rows of an evaluation grouped into lines, one for each method and budget, and what can be said of them.

A mean is taken over tasks, and only where every task of its kind was measured: a mean over fewer tasks would compare
methods on different ground.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fewer_eval.schema import Question, Row

DASH = "\u2013"
MB = 1e6
ASKED: tuple[Question, ...] = ("unseen", "seen")
YARDSTICKS = ("full", "random", "uniform")
"""In every comparison, for the others to be held against."""


@dataclass(frozen=True, eq=False)
class Line:
    """All rows of one method at one budget; `tasks` names, for each kind of question, the tasks a mean must cover."""

    method: str
    keep: str
    rows: tuple[Row, ...]
    tasks: Mapping[Question, frozenset[str]]

    def mean(self, name: str, question: Question | None = None) -> float | None:
        """The mean over tasks of one field, for one kind of question or (None) for all that this line measured."""
        values = defaultdict(list)
        for row in self.rows:
            if question in (None, row.question):
                values[row.task].append(getattr(row, name))
        needed = self.tasks.get(question, frozenset()) if question else values.keys()
        found = [value for task in sorted(needed) for value in values.get(task, [None])]
        if not found or any(value is None or not math.isfinite(value) for value in found):
            return None
        return fmean(fmean(values[task]) for task in sorted(needed))

    @property
    def samples(self) -> str:
        counts = sorted({row.n for row in self.rows})
        return str(counts[0]) if len(counts) == 1 else f"{counts[0]}{DASH}{counts[-1]}"


def lines_of(rows: Sequence[Row]) -> list[Line]:
    if not rows:
        raise ValueError("no rows: an empty evaluation is an error")
    models = sorted({row.model for row in rows})
    if len(models) > 1:
        raise ValueError(f"one report is about one model, these rows name {', '.join(models)}")
    tasks = defaultdict(set)
    groups = defaultdict(list)
    for row in rows:
        tasks[row.question].add(row.task)
        groups[row.method, budget(row.keep_asked)].append(row)
    needed = {question: frozenset(names) for question, names in tasks.items()}
    lines = [Line(method, keep, tuple(group), needed) for (method, keep), group in groups.items()]
    # Budgets may be fractions, counts or bytes; the share of bytes they leave puts all of them in one order.
    share = {
        keep: fmean(row.bytes_kept / row.bytes_full for line in lines if line.keep == keep for row in line.rows)
        for keep in {line.keep for line in lines}
    }
    return sorted(
        lines, key=lambda line: (line.method != "full", -share[line.keep], line.keep, -quality_of(line), line.method)
    )


def budget(asked: float | int | str) -> str:
    # A count of 1 and a fraction of 1.0 are equal in Python and different budgets here.
    return f"{asked} tokens" if isinstance(asked, int) else str(asked)


def quality_of(line: Line) -> float:
    """Mean quality with the question unseen; below any score where it was not measured, so that it sorts last. Rounded,
    since (0.1 + 0.2) / 2 is more than 0.3 / 2 and no method is worse for that."""
    value = line.mean("quality", "unseen")
    return -1.0 if value is None else round(value, 9)


def best_of(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The top methods of each budget; yardsticks do not compete."""
    result: dict[str, list[Line]] = {}
    for line in lines:
        if line.method in YARDSTICKS or quality_of(line) < 0:
            continue
        top = result.setdefault(line.keep, [])
        if not top or quality_of(line) == quality_of(top[0]):
            top.append(line)
    return result


def random_at(lines: Iterable[Line]) -> dict[str, float]:
    return {line.keep: quality_of(line) for line in lines if line.method == "random"}


def losers_of(lines: Sequence[Line]) -> list[Line]:
    random = random_at(lines)
    return [line for line in lines if 0 <= quality_of(line) < random.get(line.keep, -1.0)]
