"""What a search for a setting measured, as a picture: loss against what the search was to make small."""

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from fewer.tuning.result import Measured, Tuned
from fewer.tuning.risk import fixed_sequence
from fewer.tuning.setting import Setting
from fewer_eval.drawing import GREY, INK, PICTURE_STYLE, axes_of, halving, look_of, svg_of
from fewer_eval.lines import MB

GOOD, BAD = "#009e73", "#d0402b"
COSTS: dict[str, tuple[str, float, int]] = {
    "memory": ("cache, MB", 1 / MB, 2),
    "tokens": ("tokens read", 1.0, 0),
    "latency": ("answer, ms", 1000.0, 1),
}
"""For each aim: the name of its cost, what a measured value is multiplied by for it, and the digits shown."""


def cost_of(found: Measured, aim: str) -> float | None:
    """What `aim` makes small, in the units of `COSTS`; None where it was not measured."""
    return None if aim == "latency" and found.seconds is None else found.cost(aim) * COSTS[aim][1]


def pareto(found: Iterable[Measured], aim: str) -> list[Measured]:
    """Those that nothing else beats on both cost and loss: the cheapest first, each with less loss than the last."""
    known = [(cost, one.loss, one) for one in found if (cost := cost_of(one, aim)) is not None]
    best: list[Measured] = []
    for _, loss, one in sorted(known, key=lambda item: item[:2]):
        if not best or loss < best[-1].loss:
            best.append(one)
    return best


def passed(tuned: Tuned) -> int:
    """How many of the tested sequence passed, from its start up to the first that did not."""
    ps = [1.0 if one.p is None else one.p for one in tuned.sequence]
    return fixed_sequence(ps, round(1 - tuned.confidence, 12))


def frontier_picture(tuned: Tuned) -> str:
    """An SVG of all that was searched and tested, the frontier through it, what was asked, and what was chosen.

    Raises ValueError where nothing was measured.
    """
    best = pareto(tuned.searched, tuned.aim)
    named = _kinds([*best, *tuned.sequence])
    known = [one for one in (*tuned.searched, *tuned.sequence) if cost_of(one, tuned.aim) is not None]
    if not known:
        raise ValueError("nothing to draw: the cost of no setting was measured")
    with rc_context({**PICTURE_STYLE, "svg.hashsalt": "fewer frontier"}):
        figure = Figure(figsize=(10.4, 4.6), layout="constrained")
        (axes,) = axes_of(figure, 1, 1)
        others = [one for one in tuned.searched if kind_of(one.setting) not in named]
        through = passed(tuned)
        hollow = {"markeredgewidth": 1.6, "fillstyle": "none", "zorder": 4}
        layers: list[tuple[str, Sequence[Measured], dict[str, Any]]] = [
            ("other settings", others, {"color": GREY, "marker": ".", "markersize": 5}),
            *(
                (kind, [m for m in tuned.searched if kind_of(m.setting) == kind], look_of(i))
                for i, kind in enumerate(named)
            ),
            (
                "frontier",
                best,
                {"color": INK, "linestyle": "-", "linewidth": 1, "drawstyle": "steps-post", "alpha": 0.55},
            ),
            ("passed the test", tuned.sequence[:through], {"color": GOOD, "marker": "D", "markersize": 8, **hollow}),
            ("did not pass", tuned.sequence[through:], {"color": BAD, "marker": "s", "markersize": 8, **hollow}),
            (
                "chosen",
                [m for m in tuned.sequence if m.setting == tuned.chosen],
                {"color": INK, "marker": "o", "markersize": 18, **hollow},
            ),
            ("full model", [tuned.full], {"color": INK, "marker": "*", "markersize": 10}),
        ]
        shown = [(_dots(axes, found, tuned.aim, look), name) for name, found, look in layers]
        shown.append(
            (axes.axhline(tuned.loss, color=INK, linestyle="--", linewidth=1, alpha=0.7), f"asked: {tuned.loss:g}")
        )
        axes.set_title(f"Loss ({tuned.measure}) against cost")
        axes.set_xlabel(f"{COSTS[tuned.aim][0]} (log scale)")
        halving(axes)
        _stretch(axes, max(tuned.loss, *(one.loss for one in known)))
        there = [(line, name) for line, name in shown if line is not None]
        legend = figure.legend(
            [line for line, _ in there], ["."] * len(there), loc="outside right upper", labelspacing=1
        )
        # Set afterwards, as matplotlib leaves a label out of the legend when it starts with an underscore.
        for text, (_, name) in zip(legend.get_texts(), there, strict=True):
            text.set_text(name)
        return svg_of(
            figure, f"Loss against {COSTS[tuned.aim][0]} of every setting measured; the tables have the numbers."
        )


def kind_of(setting: Setting) -> str:
    """A setting's methods without its budgets.

    >>> from fewer.tuning.setting import Held, Text
    >>> kind_of(Setting(Text("llmlingua2", 0.5), Held("snapkv", 0.25, store="kivi-4bit")))
    'llmlingua2, then snapkv in kivi-4bit'
    """
    parts = [] if setting.text is None else [setting.text.method]
    if setting.held is not None:
        method = setting.held.method if isinstance(setting.held.method, str) else " + ".join(setting.held.method)
        parts.append(method + (f" in {setting.held.store}" if setting.held.store else ""))
    return ", then ".join(parts) or str(setting)


def _kinds(found: Sequence[Measured]) -> list[str]:
    return sorted({kind_of(one.setting) for one in found})


def _dots(axes: Axes, found: Iterable[Measured], aim: str, look: dict[str, Any]) -> Line2D | None:
    points = [(cost, one.loss) for one in found if (cost := cost_of(one, aim)) is not None]
    if not points:
        return None
    # Not clipped, so that a marker on the edge (a loss of 0) is drawn whole.
    return axes.plot(*zip(*points, strict=True), **{"linestyle": "none", "clip_on": False, "zorder": 3, **look})[0]


def _stretch(axes: Axes, most: float) -> None:
    """Losses by their square root: 0 has a place, what is asked is told from it, and a loss of 1 fits too."""
    axes.set_yscale("function", functions=(lambda y: abs(y) ** 0.5, lambda y: y**2))
    axes.set_ylim(0, most * 1.15)
    steps = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    ticks = [one for one in steps if one <= most * 1.15 and (one == 0 or one >= most / 60)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{one:g}" for one in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
