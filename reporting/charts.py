"""Curves and the histogram of a report, drawn by matplotlib as SVG files.

They are drawn for a light page; on a dark page the style sheet inverts them. matplotlib takes a second to import, so
it is imported only when something is drawn.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, FAINT = "#1a2026", "#56616b", "#cbd1d7"
# Okabe and Ito's colours can be told apart without full colour vision, the dashes in print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "usad",  # the same numbers give the same file
    "text.parse_math": False,  # a branch's name may hold a $
}


def draw(plot: Callable[..., None], x_title: str, y_title: str, **options: Any) -> bytes:
    """The SVG file of a chart with its legend; `plot`, one of the functions below, gets the axes and `options`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    content = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.4))
        axes = figure.add_subplot(xlabel=x_title, ylabel=y_title)
        plot(axes, **options)
        axes.tick_params(which="both", length=0, labelcolor=SOFT)
        axes.grid(color=FAINT)
        axes.set_axisbelow(True)
        axes.spines[:].set_color(FAINT)
        lines = -(-len(axes.get_legend_handles_labels()[1]) // 2)
        figure.subplots_adjust(left=0.15, right=0.95, top=0.97, bottom=0.15 + 0.055 * lines)  # no search for a layout
        figure.legend(loc="lower center", ncols=2, frameon=False)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    return content.getvalue()


def curves(axes: Axes, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], x_limit: float, chance: bool) -> None:
    """Any number of curves (x [K], y [K]) by label, the main one first; `chance` adds that of a random ranking."""
    axes.set(xlim=(0, x_limit), ylim=(0, 1.01))
    if chance:
        axes.axline((0, 0), slope=1, color=SOFT, linewidth=0.8, linestyle=":")
    main, *others = lines.items()
    axes.plot(*main[1], label=main[0], color=INK, linewidth=2.2, zorder=3)
    looks = zip(itertools.cycle(COLORS), itertools.cycle(DASHES), strict=False)
    for (label, points), (color, dashes) in zip(others, looks, strict=False):
        axes.plot(*points, label=label, color=color, linewidth=1.4, linestyle=dashes)


def histogram(axes: Axes, groups: Mapping[str, np.ndarray], threshold: float | None) -> None:
    """Counts of each group's scores [n] in common bins, the threshold as a line; a log axis for long tails."""
    values = np.concatenate([*groups.values(), [] if threshold is None else [threshold]])
    log = values.min() > 0 and values.max() > 30 * np.median(values)
    position = np.log10 if log else np.asarray
    low, high = position(values.min()), position(values.max())
    if high - low < 1e-6 * max(1.0, abs(high)):  # frames that are the same but for rounding
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, int(np.clip(4 * math.sqrt(values.size), 10, 60)) + 1)
    for (label, own), color, dashes in zip(groups.items(), COLORS, DASHES, strict=False):
        counts, _ = np.histogram(position(own), edges)
        look = {"facecolor": f"{color}59", "edgecolor": color, "linewidth": 1.2, "linestyle": dashes}
        axes.stairs(counts, 10**edges if log else edges, fill=True, label=label, **look)
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=1.2, linestyle="--", label=f"threshold {threshold:.4g}")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.get_major_locator().set_params(integer=True)
