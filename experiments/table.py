"""A table: its cells, each computed once and kept on disk, and its files: Markdown, CSV, JSON, PNG plots."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.files import atomic_write, digest_of_lines, write_csv, write_json, write_text
from utils.processes import ProcessFailed
from utils.safe_text import safe_cell

VERSION = 5  # goes up when a figure is computed in another way, so that older cells are not used again
PLOTTED = ("image_auroc", "pixel_auroc", "aupro")
IN_FORCE = "the value in force"


class Unavailable(Exception):
    """Why a cell has no figures. It is not stored, so that the next run tries again."""


class Cell(NamedTuple):
    """Figures that depend on nothing but `needs` (JSON values), so that a finished cell is found again by them."""

    needs: dict[str, Any]
    compute: Callable[[], dict[str, Any]]


class Row(NamedTuple):
    """A row of a table: a cell for each seed."""

    label: str
    cells: list[Cell]
    note: str = ""


class Section(NamedTuple):
    """Rows whose labels stand under `heading`; `plot` names the file of their line plot, if they have one."""

    title: str
    heading: str
    rows: list[Row]
    plot: str | None = None


class Table(NamedTuple):
    """Sections under the headings `columns`: figure -> heading."""

    name: str
    columns: dict[str, str]
    sections: list[Section]
    remarks: list[str]
    seeded: bool = True  # whether rows are means over the seeds


Rows = list[dict[str, Any]]  # as `computed` gives them
Sections = list[tuple[Section, Rows]]


def figures_of(folder: Path, cell: Cell) -> dict[str, Any]:
    """The cell's figures, from its file in `folder` or computed now. Raises Unavailable or ProcessFailed."""
    path = folder / f"{digest(cell.needs)}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["figures"]
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        figures = cell.compute()
    write_json(path, {"needs": cell.needs, "figures": figures})
    return figures


def computed(folder: Path, row: Row) -> dict[str, Any]:
    """The row as JSON values: each figure's mean, standard deviation, and value for each seed."""
    notes, results = [row.note], []
    try:
        results = [figures_of(folder, cell) for cell in row.cells]
    except (Unavailable, ProcessFailed) as reason:
        notes = [str(reason)]
    notes += [str(figures.get("note", "")) for figures in results]
    names = dict.fromkeys(name for figures in results for name in figures if name != "note")
    return {
        "label": row.label,
        "figures": {name: spread([figures.get(name) for figures in results]) for name in names},
        "note": "; ".join(filter(None, dict.fromkeys(notes))),
    }


def spread(values: list[float | None]) -> dict[str, Any]:
    """Mean and sample standard deviation; None if a value is undefined, the deviation also for a single value."""
    defined = None not in values
    return {
        "mean": float(np.mean(values)) if defined else None,
        "sd": float(np.std(values, ddof=1)) if defined and len(values) > 1 else None,
        "values": values,
    }


def digest(needs: Any) -> str:
    """A file name for JSON values."""
    return digest_of_lines([json.dumps([VERSION, needs], sort_keys=True)])[:32]


def write_table(folder: Path, table: Table, sections: Sections, facts: dict[str, Any]) -> None:
    """Write <name>.md, .csv, .json and the plots of the sections."""
    facts = facts if table.seeded else {**facts, "seeds": None}
    for section, rows in sections:
        if section.plot:
            plot(folder / section.plot, section.title, rows, table.columns)
    write_text(folder / f"{table.name}.md", markdown(table, sections, facts))
    write_csv(folder / f"{table.name}.csv", lines_of(table, sections))
    content = [{"title": section.title, "rows": rows} for section, rows in sections]
    write_json(folder / f"{table.name}.json", {"table": table.name, **facts, "sections": content})


def markdown(table: Table, sections: Sections, facts: dict[str, Any]) -> str:
    """The table for people: means, with ± standard deviation if there are several seeds."""
    source = "the checkpoints as they are"
    if seeds := facts["seeds"]:
        source = f"mean{' ± standard deviation' * (len(seeds) > 1)} over the seeds {', '.join(map(str, seeds))}"
    lines = [f"# {table.name.capitalize()}: {facts['category']}", ""]
    lines += [f"{facts['images']} test images, {facts['anomalous']} anomalous; {source}.", ""]
    for section, rows in sections:
        names = [name for name in table.columns if any(name in row["figures"] for row in rows)]
        lines += [f"## {section.title}", ""] if len(sections) > 1 else []
        lines += [f"![{section.title}]({section.plot})", ""] if section.plot else []
        lines.append(_line([section.heading, *(table.columns[name] for name in names), "note"]))
        lines.append(_line(["---", *["---:"] * len(names), "---"]))
        for row in rows:
            lines.append(_line([row["label"], *(_text(row["figures"].get(name)) for name in names), row["note"]]))
        lines.append("")
    return "\n".join([*lines, *(f"{remark}\n" for remark in table.remarks)]).rstrip() + "\n"


def lines_of(table: Table, sections: Sections) -> Iterator[list[Any]]:
    """The lines of the CSV file, with all digits; `<figure>_sd` is empty with a single seed."""
    yield ["section", "row", *(f"{name}{end}" for name in table.columns for end in ("", "_sd")), "note"]
    for section, rows in sections:
        for row in rows:
            found = [row["figures"].get(name, {}).get(key) for name in table.columns for key in ("mean", "sd")]
            yield [section.title, safe_cell(row["label"]), *found, safe_cell(row["note"])]


def plot(path: Path, title: str, rows: Rows, columns: dict[str, str]) -> None:
    """The rows' figures over their labels, evenly spaced; bars are standard deviations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=title, xlim=(-0.4, len(rows) - 0.6))
    for name, marker in zip(PLOTTED, "os^", strict=True):
        points = [(x, row["figures"][name]) for x, row in enumerate(rows) if name in row["figures"]]
        points = [(x, point["mean"], point["sd"] or 0.0) for x, point in points if point["mean"] is not None]
        if points:
            places, means, deviations = zip(*points, strict=True)
            axes.errorbar(places, means, deviations, marker=marker, capsize=3, label=columns[name])
    for x, row in enumerate(rows):
        if row["note"] == IN_FORCE:
            axes.axvline(x, color="0.6", linestyle=":", zorder=0, label=IN_FORCE)
    axes.set_xticks(range(len(rows)), [row["label"] for row in rows])
    axes.grid(axis="y", color="0.9")
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _text(figure: dict[str, Any] | None) -> str:
    if not figure or figure["mean"] is None:
        return "–"
    digits = 4 if abs(figure["mean"]) < 10 else 1
    mean = f"{figure['mean']:.{digits}f}"
    return mean if figure["sd"] is None else f"{mean} ± {figure['sd']:.{digits}f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
