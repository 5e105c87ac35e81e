"""Pictures of an evaluation as SVG: quality against bytes, and where the entries stay. The same rows, the same text."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fewer_eval.drawing import COLOURS, GREY, INK, PICTURE_STYLE, axes_of, halving, look_of, svg_of
from fewer_eval.lines import MB, YARDSTICKS, Line, lines_of
from fewer_eval.schema import Question, Row


def picture(rows: Sequence[Row]) -> str:
    """An SVG of quality (and of KL on running text) against the bytes kept, one line per method."""
    lines = lines_of(rows)
    panels: list[tuple[str, str, Question]] = [
        ("Quality, question unseen", "quality", "unseen"),
        ("Quality, question seen", "quality", "seen"),
        ("KL on running text, bits (lower is better)", "kl_bits", "none"),
    ]
    panels = [panel for panel in panels if any(line.mean(*panel[1:]) is not None for line in lines)]
    if not panels:
        raise ValueError("nothing to draw: no quality and no KL was measured on every task of its kind")
    methods = list(dict.fromkeys(line.method for line in lines))
    looks = _looks(methods)
    with rc_context({**PICTURE_STYLE, "svg.hashsalt": "fewer quality"}):
        figure = Figure(figsize=(10.4, 3.7 + 0.2 * math.ceil(len(methods) / 6)), layout="constrained")
        for axes, (title, name, question) in zip(axes_of(figure, 1, len(panels)), panels, strict=True):
            for method in methods:
                _draw(axes, [line for line in lines if line.method == method], name, question, looks[method])
            _finish(axes, title, name)
        _legend(figure, looks)
        return svg_of(figure, "Quality against megabytes of cache kept, one line a method; the table has the numbers.")


def scatter(panels: Mapping[str, Sequence[tuple[str, float, float]]], along: str) -> str:
    """An SVG with one panel a title, each a line a method of `(method, x, quality)`; `along` names the x axis."""
    methods = list(dict.fromkeys(method for points in panels.values() for method, _, _ in points))
    if not methods:
        raise ValueError("nothing to draw: no quality was measured")
    looks = _looks(methods)
    with rc_context({**PICTURE_STYLE, "svg.hashsalt": "fewer scatter"}):
        figure = Figure(figsize=(10.4, 3.9 + 0.2 * math.ceil(len(methods) / 6)), layout="constrained")
        for axes, (title, points) in zip(axes_of(figure, 1, len(panels)), panels.items(), strict=True):
            for method in methods:
                mine = sorted((x, y) for name, x, y in points if name == method)
                if mine:
                    axes.plot(*zip(*mine, strict=True), **looks[method], clip_on=False)
                if mine and method == "full":
                    axes.axhline(mine[-1][1], color=INK, linestyle="--", linewidth=1, alpha=0.6)
            axes.set_title(title)
            axes.set_xlabel(along)
        _legend(figure, looks)
        return svg_of(figure, f"Quality against {along}, one line per method; the tables have the numbers.")


def kept_picture(kept: Mapping[str, list[list[int]]]) -> str:
    """An SVG of kept entries per layer, a panel per method: the mean over heads, and a band from least to most."""
    if not kept:
        raise ValueError("nothing to draw: no kept entries were recorded")
    panels: dict[str, dict[str, list[list[int]]]] = {}
    for name, layers in kept.items():
        method, _, keep = name.partition(" @ ")
        panels.setdefault(method, {})[keep] = layers
    keeps = list(dict.fromkeys(keep for panel in panels.values() for keep in panel))
    looks: dict[str, dict[str, Any]] = {
        keep: {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}
        for i, keep in enumerate(keeps)
    }
    columns = min(4, len(panels))
    count = math.ceil(len(panels) / columns)
    with rc_context({**PICTURE_STYLE, "svg.hashsalt": "fewer kept"}):
        figure = Figure(figsize=(10.4, 0.7 + 1.7 * count), layout="constrained")
        grid = axes_of(figure, count, columns, share=True)
        for axes, (method, entries) in zip(grid, panels.items(), strict=False):
            for keep, layers in entries.items():
                look = looks[keep]
                at = range(len(layers))
                axes.fill_between(
                    at, list(map(min, layers)), list(map(max, layers)), fc=look["color"], alpha=0.22, lw=0
                )
                axes.plot(at, list(map(fmean, layers)), **look)
            axes.set_title(method)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid[0].set_ylim(bottom=0)
        for i, axes in enumerate(grid):
            axes.tick_params(labelbottom=i + columns >= len(panels))
            if i >= len(panels):
                axes.remove()
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("entries kept per head", fontsize=9)
        if any(keeps):
            handles = [grid[0].plot([], [], **looks[keep])[0] for keep in keeps]
            labels = [f"keep {keep}" for keep in keeps]
            figure.legend(handles, labels, loc="outside upper right", ncols=min(8, len(keeps)))
        return svg_of(figure, "Entries kept per layer, one panel per method; the table below has the numbers.")


def _looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn: yardsticks in grey, the full model in ink."""
    looks = {name: look_of(i) for i, name in enumerate(sorted(set(methods) - set(YARDSTICKS)))} | {
        "full": {"color": INK, "linestyle": "--", "marker": "*", "markersize": 8},
        "random": {"color": GREY, "linestyle": ":", "marker": "x", "markersize": 5},
        "uniform": {"color": GREY, "linestyle": "-.", "marker": "+", "markersize": 6},
    }
    return {name: looks[name] for name in methods}


def _legend(figure: Figure, looks: Mapping[str, dict[str, Any]]) -> None:
    handles = [figure.axes[0].plot([], [], **look)[0] for look in looks.values()]
    legend = figure.legend(handles, ["."] * len(looks), loc="outside lower center", ncols=min(6, len(looks)))
    # Set afterwards, as matplotlib leaves a label out of the legend when it starts with an underscore.
    for text, method in zip(legend.get_texts(), looks, strict=True):
        text.set_text(method)


def _draw(axes: Axes, lines: Sequence[Line], name: str, question: Question, look: Mapping[str, Any]) -> None:
    measured = [(line.mean("bytes_kept", question), line.mean(name, question)) for line in lines]
    points = sorted((kept / MB, value) for kept, value in measured if kept is not None and value is not None)
    if not points:
        return
    # Not clipped, so that a marker on the edge (full at KL 0) is drawn whole.
    axes.plot(*zip(*points, strict=True), **look, clip_on=False)
    if lines[0].method == "full" and name == "quality":
        axes.axhline(points[-1][1], color=INK, linestyle="--", linewidth=1, alpha=0.6)


def _finish(axes: Axes, title: str, name: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("cache kept, MB (log scale)")
    halving(axes)
    if name == "quality":
        axes.set_ylim(-0.03, 1.03)
    else:
        axes.set_ylim(bottom=0)
