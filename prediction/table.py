"""predictions.csv: a row for each frame, and for what happened instead of one."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from datasets.frames import STATUSES, Frame, is_of_file
from models.fusion.prediction import Prediction
from utils.errors import InputError
from utils.files import atomic_write
from utils.safe_text import safe_cell

csv.field_size_limit(1 << 30)  # characters of a cell: a noisy frame, or one of many tiles, has boxes by the thousand
COLUMNS = ("source", "frame", "time", "score", "anomalous", "area", "boxes", "status")


class Former(NamedTuple):
    rows: int
    files: int  # of a watched folder that are done
    last: dict[str, tuple[str, str]]  # by source: frame number and time of its last row


def row(frame: Frame, prediction: Prediction | None, alarm: bool | None) -> dict[str, Any]:
    """By column, as JSON values; None for what needs a prediction or a threshold that is not there."""
    score, area, boxes = (prediction.score, prediction.area, prediction.boxes) if prediction else (None,) * 3
    values = (frame.source, frame.number, frame.time, score, alarm, area, boxes, frame.status)
    return dict(zip(COLUMNS, values, strict=True))


class Table:
    """The file; each row is on the disk when `add` returns."""

    def __init__(self, path: Path, former_rows: int) -> None:
        self.rows = former_rows  # that are in the file, and stay there
        self.alarms = 0
        self.statuses: Counter[str] = Counter()
        self._file = open(path, "a" if former_rows else "w", encoding="utf-8", newline="")  # noqa: SIM115 (closed by close)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not former_rows:
            self._writer.writerow(COLUMNS)

    def add(self, values: dict[str, Any]) -> None:
        alarm, boxes = values["anomalous"], values["boxes"]
        cells = {
            "source": safe_cell(values["source"]),
            "anomalous": None if alarm is None else int(alarm),
            "boxes": None if boxes is None else json.dumps(boxes),
        }
        self._writer.writerow((values | cells).values())
        try:
            self._file.flush()
        except OSError as error:
            error.filename = self._file.name
            raise
        self.rows += 1
        self.statuses[values["status"]] += 1
        self.alarms += bool(alarm)

    def close(self) -> None:
        self._file.close()


def read_former(path: Path) -> Former:
    """The rows that an earlier run left at `path`, but for a last one that a kill or a full disk has cut off.

    Raises InputError if the file has other columns or another encoding.
    """
    last, rows, files = {}, 0, 0
    with (
        atomic_write(path) as temporary,
        # It may end within a character, and begin with Excel's mark.
        open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as old,
        open(temporary, "w", encoding="utf-8", newline="") as new,
    ):
        writer = csv.writer(new, lineterminator="\n")
        reader = csv.reader(line.replace("\0", "") for line in old)
        if tuple(next(reader, ())) != COLUMNS:
            raise InputError(f"{path} was written by another version; choose another --out")
        writer.writerow(COLUMNS)
        for row in reader:
            if len(row) == len(COLUMNS) and row[-1] in STATUSES:
                try:
                    writer.writerow(row)
                except UnicodeEncodeError:
                    raise InputError(
                        f"{path} is not in UTF-8 any more: another program has saved it; choose another --out"
                    ) from None
                last[row[0]] = row[1], row[2]
                rows += 1
                files += is_of_file(row[2])
    return Former(rows, files, last)
