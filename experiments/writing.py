"""The tables as files: Markdown to read, CSV to compute with, JSON with the value of every seed, PNG plots."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from experiments.cells import CellStore, Section, Table
from experiments.fusions import IN_FORCE
from utils.csv_cells import safe_cell
from utils.files import atomic_write, write_json, write_text

PLOTTED = ("image_auroc", "pixel_auroc", "aupro")


def write_table(folder: Path, table: Table, store: CellStore, facts: dict[str, Any]) -> None:
    """Write <name>.md, .csv, .json and the plots of the sections; all cells are in `store` or unavailable."""
    facts = facts if table.seeded else {**facts, "seeds": None}
    sections = [(section, [store.row(row) for row in section.rows]) for section in table.sections]
    for section, rows in sections:
        if section.plot:
            plot(folder / section.plot, section, rows, table.columns)
    write_text(folder / f"{table.name}.md", markdown(table, sections, facts))
    write_text(folder / f"{table.name}.csv", comma_separated(table, sections))
    content = [{"title": section.title, "rows": rows} for section, rows in sections]
    write_json(folder / f"{table.name}.json", {"table": table.name, **facts, "sections": content})


def markdown(table: Table, sections: list[tuple[Section, list[dict[str, Any]]]], facts: dict[str, Any]) -> str:
    """The table for people: means, with ± standard deviation if there are several seeds."""
    lines = [f"# {table.title}: {facts['category']}", ""]
    seeds = facts["seeds"]
    source = "the checkpoints as they are"
    if seeds:
        source = f"mean{' ± standard deviation' * (len(seeds) > 1)} over the seeds {', '.join(map(str, seeds))}"
    lines += [f"{facts['images']} test images, {facts['anomalous']} anomalous; {source}.", ""]
    for section, rows in sections:
        names = [name for name in table.columns if any(name in row["figures"] for row in rows)]
        labels = list(rows[0]["labels"])
        lines += [f"## {section.title}", ""] if len(sections) > 1 else []
        lines += [f"![{section.title}]({section.plot})", ""] if section.plot else []
        lines.append(_line([*labels, *(table.columns[name] for name in names), "note"]))
        lines.append(_line(["---"] * len(labels) + ["---:"] * len(names) + ["---"]))
        for row in rows:
            cells = [_text(row["figures"].get(name)) for name in names]
            lines.append(_line([*(str(row["labels"][label]) for label in labels), *cells, row["note"]]))
        lines.append("")
    return "\n".join([*lines, *(f"{remark}\n" for remark in table.remarks)]).rstrip() + "\n"


def comma_separated(table: Table, sections: list[tuple[Section, list[dict[str, Any]]]]) -> str:
    """One line for each row, with all digits; `<figure>_sd` is empty with a single seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["section", "row", *(f"{name}{end}" for name in table.columns for end in ("", "_sd")), "note"])
    for section, rows in sections:
        for row in rows:
            found = [row["figures"].get(name, {}).get(key) for name in table.columns for key in ("mean", "sd")]
            cells = ["" if value is None else repr(value) for value in found]
            label = " ".join(map(str, row["labels"].values()))
            writer.writerow([section.title, safe_cell(label), *cells, safe_cell(row["note"])])
    return text.getvalue()


def plot(path: Path, section: Section, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """The section's figures over its values, evenly spaced; bars are standard deviations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    for name, marker in zip(PLOTTED, "os^", strict=True):
        points = [(x, row["figures"].get(name, {})) for x, row in enumerate(rows)]
        points = [(x, point["mean"], point["sd"] or 0.0) for x, point in points if point.get("mean") is not None]
        if points:
            places, means, deviations = zip(*points, strict=True)
            axes.errorbar(places, means, deviations, marker=marker, capsize=3, label=columns[name])
    axes.set_xticks(range(len(rows)), [row["labels"]["value"] for row in rows])
    for x, row in enumerate(rows):
        if row["note"] == IN_FORCE:
            axes.axvline(x, color="0.6", linestyle=":", zorder=0, label=IN_FORCE)
    axes.set(xlabel=section.title, xlim=(-0.4, len(rows) - 0.6))
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
