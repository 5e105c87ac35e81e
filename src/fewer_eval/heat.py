"""Heat maps of what each layer and head keeps."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fewer_eval.drawing import INK, PICTURE_STYLE, axes_of, svg_of

Layers = Sequence[Sequence[float]]
"""What each layer's heads keep: entries, or a share of them. Layers may have different numbers of heads."""


def uneven(panels: Mapping[str, Layers]) -> dict[str, Layers]:
    """Those in which some layer or head keeps more than another; of the others a map would show one flat colour.

    >>> uneven({"snapkv @ 0.5": [[8, 8], [8, 8]], "adakv @ 0.5": [[6, 10], [7, 9]]})
    {'adakv @ 0.5': [[6, 10], [7, 9]]}
    """
    return {name: layers for name, layers in panels.items() if len({one for heads in layers for one in heads}) > 1}


def heat_picture(panels: Mapping[str, Layers], what: str) -> str:
    """An SVG with a map for each name, layers from left to right and heads from top to bottom, on one scale from 0.

    `what` names the scale: "entries kept", "share kept". Raises ValueError where there is nothing to draw.
    """
    if not any(heads for layers in panels.values() for heads in layers):
        raise ValueError("nothing to draw: no layer says what it kept")
    most = max(one for layers in panels.values() for heads in layers for one in heads)
    columns = min(3, len(panels))
    count = math.ceil(len(panels) / columns)
    tall = max(len(heads) for layers in panels.values() for heads in layers)
    height = min(max(0.3, 0.16 * tall), 2.0) + 0.42
    with rc_context({**PICTURE_STYLE, "axes.grid": False, "svg.hashsalt": "fewer heat"}):
        figure = Figure(figsize=(10.4, 0.75 + count * height), layout="constrained")
        grid = axes_of(figure, count, columns)
        for axes, (name, layers) in zip(grid, panels.items(), strict=False):
            # with interpolation "none" the cells stay cells however large the picture is shown
            drawn = axes.imshow(
                _cells(layers), cmap="viridis", vmin=0, vmax=most or 1, aspect="auto", interpolation="none"
            )
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_yticks(range(0, max(map(len, layers)), math.ceil(tall / 4)))
        for axes in grid[len(panels) :]:
            axes.remove()
        bar = figure.colorbar(drawn, ax=grid[: len(panels)], label=what, fraction=0.04, pad=0.01)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)
        bar.outline.set_edgecolor(INK)
        bar.locator = MaxNLocator(4)
        bar.update_ticks()
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("head", fontsize=9)
        return svg_of(figure, f"Heat map of {what} in each layer and head; the table below has the numbers.")


def _cells(layers: Layers) -> np.ndarray:
    """(heads, layers), not a number where a layer has no such head."""
    cells = np.full((max(map(len, layers), default=0) or 1, len(layers)), np.nan)
    for at, heads in enumerate(layers):
        cells[: len(heads), at] = heads
    return cells
