"""Cost against size, both on logarithmic axes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from benchmarks.measure import Row

COLUMNS = 3


def plot(rows: list[Row], path: Path) -> bool:
    """One panel for each unit of size, one line for each stage and side; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[row.unit][row.stage].append(row)
    if not panels:
        return False
    count = len(panels)
    lines = -(-count // COLUMNS)
    figure, axes = pyplot.subplots(
        lines, min(count, COLUMNS), figsize=(5 * min(count, COLUMNS), 4 * lines), squeeze=False
    )
    for axis in axes.flat[count:]:
        axis.remove()
    for axis, (unit, by_stage) in zip(axes.flat, panels.items(), strict=False):
        for color, (stage, points) in enumerate(by_stage.items()):
            points.sort(key=lambda row: row.size)
            axis.plot([row.size for row in points], [row.ours for row in points], "o-", color=f"C{color}", label=stage)
            known = [row for row in points if row.reference]
            axis.plot([row.size for row in known], [row.reference for row in known], "x--", color=f"C{color}")
        axis.set(xscale="log", yscale="log", xlabel=unit, ylabel="seconds", title="solid: ours, dashed: reference")
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
