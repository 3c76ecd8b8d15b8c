"""The cells of the tables: each is computed once and kept under a key made of everything that it depends on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import digest_of_lines, write_json

VERSION = 2  # goes up when a figure is computed in another way, so that older cells are not used again


class Unavailable(Exception):
    """Why a cell has no figures. It is not stored, so that the next run tries again."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """Figures that depend on nothing but `needs` (JSON values)."""

    needs: dict[str, Any]
    compute: Callable[[], dict[str, Any]]

    @property
    def key(self) -> str:
        return digest(self.needs)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: for each seed the cells with its figures, or figures from elsewhere."""

    labels: dict[str, Any]
    seeds: list[tuple[Cell, ...]] = dataclasses.field(default_factory=list)
    figures: dict[str, float] | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows of one kind; `plot` names the file of their line plot, if they have one."""

    title: str
    rows: list[Row]
    plot: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Sections under the headings `columns`: figure -> heading."""

    name: str
    title: str
    columns: dict[str, str]
    sections: list[Section]
    remarks: list[str] = dataclasses.field(default_factory=list)
    seeded: bool = True  # whether rows are means over the seeds

    def cells(self) -> Iterator[Cell]:
        for section in self.sections:
            for row in section.rows:
                for cells in row.seeds:
                    yield from cells


class CellStore:
    """A folder of finished cells, one JSON file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: dict[str, str] = {}

    def result(self, cell: Cell) -> dict[str, Any]:
        """The cell's figures, from the folder or computed now. Raises Unavailable if there are none."""
        path = self.folder / f"{cell.key}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))["figures"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if cell.key in self.failed:
            raise Unavailable(self.failed[cell.key])
        try:
            figures = cell.compute()
        except Unavailable as reason:
            self.failed[cell.key] = str(reason)
            raise
        write_json(path, {"needs": cell.needs, "figures": figures})
        return figures

    def row(self, row: Row) -> dict[str, Any]:
        """The row as JSON values: each figure's mean, standard deviation, and value for each seed."""
        note, by_seed = row.note, [row.figures] if row.figures else []
        try:
            for cells in row.seeds:
                by_seed.append({key: value for cell in cells for key, value in self.result(cell).items()})
        except Unavailable as reason:
            note, by_seed = str(reason), []
        names = dict.fromkeys(key for figures in by_seed for key in figures)
        notes = dict.fromkeys([note, *(str(figures.get("note", "")) for figures in by_seed)])
        return {
            "labels": row.labels,
            "figures": {key: spread([figures.get(key) for figures in by_seed]) for key in names if key != "note"},
            "note": "; ".join(filter(None, notes)),
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
