"""The report of a search for a setting: a table for the terminal, and one HTML page."""

import json
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from fewer.tuning.result import Measured, Tuned
from fewer.tuning.setting import Setting
from fewer_eval.frontier import COSTS, cost_of, frontier_picture, pareto, passed
from fewer_eval.heat import heat_picture
from fewer_eval.lines import DASH
from fewer_eval.page import number, write_page


def tuned_table(tuned: Tuned) -> Table:
    """The full model and the frontier of the search, then the settings tested, the chosen one in bold, then that one on
    held-out examples.
    """
    costs = _costs(tuned)
    table = Table("measured on", "setting", "loss", *(COSTS[aim][0] for aim in costs), "n", "p", "")
    for column in table.columns[2:-1]:
        column.justify = "right"
    groups = (
        ("search", [(tuned.full, "full model"), *((one, "frontier") for one in pareto(tuned.searched, tuned.aim))]),
        ("calibration", list(zip(tuned.sequence, _verdicts(tuned), strict=True))),
        ("held out", [(tuned.held, "")] if tuned.held else []),
    )
    for part, found in groups:
        for one, verdict in found:
            cells = [part, str(one.setting), number(one.loss, 4), *(shown(one, aim) for aim in costs)]
            cells += [str(one.n), number(one.p, 4), verdict]
            # Text, not str: rich would read square brackets in a name as markup
            table.add_row(*map(Text, cells), style="bold" if verdict == "chosen" else None)
        table.add_section()
    return table


def write_tuned(path: str | Path, tuned: Tuned) -> None:
    """Write what a search found as one page that asks nothing of the network: the bound first, then what led to it."""
    everything = (*tuned.searched, *tuned.sequence)
    drawn = any(cost_of(one, tuned.aim) is not None for one in everything)
    budgets = {str(tuned.chosen): tuned.budgets} if any(tuned.budgets) else {}
    tested = list(zip(tuned.sequence, _verdicts(tuned), strict=True))
    write_page(
        path,
        "report_tune.html.j2",
        tuned=tuned,
        run=tuned,
        aims={aim: COSTS[aim][0] for aim in _costs(tuned)},
        shown=shown,
        picture=Markup(frontier_picture(tuned)) if drawn else "",  # noqa: S704 - our own SVG, names escaped in it
        heat=Markup(heat_picture(budgets, "share kept")) if budgets else "",  # noqa: S704 - as above
        heat_rows=heads_of(tuned.budgets),
        frontier=pareto(tuned.searched, tuned.aim),
        tested=tested,
        gains=_gains(tuned),
        setting=_written(tuned.chosen) if tuned.chosen else "",
        by_task=[(one, where) for one, where in _by_task(tuned, tested) if one.tasks],
        tasks=sorted({task for one, _ in _by_task(tuned, tested) for task in one.tasks}),
    )


def shown(found: Measured, aim: str) -> str:
    """A cost as text, in the unit that `COSTS` names."""
    return number(cost_of(found, aim), COSTS[aim][2])


def heads_of(layers: Sequence[Sequence[float]]) -> list[list[float | None]]:
    """Turned about: for each head its value in every layer, None where a layer has no such head.

    >>> heads_of([[0.5, 0.25], [1.0]])
    [[0.5, 1.0], [0.25, None]]
    """
    most = max(map(len, layers), default=0)
    return [[heads[at] if at < len(heads) else None for heads in layers] for at in range(most)]


def _costs(tuned: Tuned) -> list[str]:
    """The costs that were measured, what was aimed at first."""
    timed = any(one.seconds is not None for one in (tuned.full, *tuned.searched, *tuned.sequence))
    return sorted((aim for aim in COSTS if aim != "latency" or timed), key=lambda aim: aim != tuned.aim)


def _verdicts(tuned: Tuned) -> list[str]:
    through = passed(tuned)

    def verdict(at: int, one: Measured) -> str:
        if one.setting == tuned.chosen:
            return "chosen"
        return "passed" if at < through else "given up" if one.p is None else "failed"

    return [verdict(at, one) for at, one in enumerate(tuned.sequence)]


def _gains(tuned: Tuned) -> list[tuple[str, str, str, str]]:
    """Each cost of the full model and of the chosen setting, on the same examples, and their ratio."""
    same = [one for one in tuned.searched if one.setting == tuned.chosen and one.n == tuned.full.n]
    gains = []
    for aim in _costs(tuned) if same else []:
        before, after = cost_of(tuned.full, aim), cost_of(same[0], aim)
        times = f"{before / after:.2f}" if before and after else DASH
        gains.append((COSTS[aim][0], shown(tuned.full, aim), shown(same[0], aim), times))
    return gains


def _written(setting: Setting) -> str:
    """All that it asks, a line each: "held.keep = 0.25"."""
    return "\n".join(
        f"{part}.{name} = {json.dumps(value)}"
        for part, asked in setting.to_dict().items()
        for name, value in asked.items()
    )


def _by_task(tuned: Tuned, tested: list[tuple[Measured, str]]) -> list[tuple[Measured, str]]:
    rows = [(one, f"calibration, {verdict}") for one, verdict in tested]
    return rows + ([(tuned.held, "held out")] if tuned.held else [])
