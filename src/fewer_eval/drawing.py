"""What all pictures share: colours, the way they are written as SVG, and an axis on which halves are equal steps."""

import io
import re
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Readable on white and on near-black (contrast 3 or more), and told apart under red and green blindness; as markers
# come in a number with no common factor, 35 methods pass before a colour and marker repeat together.
COLOURS = ("#1f74d1", "#e06a10", "#009e73", "#d062a8", "#8a6a2a")
MARKERS = "osD^vPX"
GREY = "#8f8f8f"
# A stand-in that becomes the page's own text colour, so that one picture serves light and dark.
INK = "#010203"
INK_STYLE = (
    "<style>.fewer-picture{color:#1f2328}@media (prefers-color-scheme:dark){.fewer-picture{color:#e6e8eb}}</style>"
)
PICTURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.14,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.04,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
}


def look_of(i: int) -> dict[str, Any]:
    """The colour and marker of the i-th method."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def axes_of(figure: Figure, rows: int, columns: int, share: bool = False) -> list[Axes]:
    """The axes of a grid, row by row."""
    return list(figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).flat)


def halving(axes: Axes) -> None:
    """Make the x axis logarithmic: budgets halve again and again, so equal steps on the axis are equal factors."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(left=min(low, high / 2))  # wide enough to hold two ticks
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def svg_of(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element that a page can hold; `label` is what is said to those who do not see it."""
    buffer = io.StringIO()
    # All of the metadata goes: the date would make each run differ, the rest names outside addresses.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    head = f'<svg class="fewer-picture" role="img" aria-label="{escape(label)}" '
    text = text[text.index("<svg ") :].replace("<svg ", head, 1).replace(INK, "currentColor")
    # Groups are numbered from one in each picture, and two pictures on a page may not share an id.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<image[^>]*?) id="[^"]*"', r"\1", text)
    return text.replace("<defs>", INK_STYLE + "<defs>", 1)
