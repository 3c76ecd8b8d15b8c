"""Cost against size, both on logarithmic axes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from benchmarks.measure import Row

COLUMNS = 3


def plot(rows: list[Row], path: Path) -> None:
    """One panel for each unit of size, one colour for each stage; the reference is dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[row.unit][row.stage].append(row)
    lines, columns = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    figure = Figure(figsize=(5 * columns, 4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("cost against size; solid: this project, dashed: the plain reference")
    for place, (unit, by_stage) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, place, xscale="log", yscale="log", xlabel=unit, ylabel="seconds")
        for color, (stage, points) in enumerate(by_stage.items()):
            points.sort(key=lambda row: row.size)
            axes.plot([row.size for row in points], [row.ours for row in points], "o-", color=f"C{color}", label=stage)
            known = [row for row in points if row.reference]
            axes.plot([row.size for row in known], [row.reference for row in known], "x--", color=f"C{color}")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
