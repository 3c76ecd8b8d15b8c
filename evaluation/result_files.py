"""The files that a test run writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.mvtec import Sample
from evaluation.results import Results
from metrics import protocols
from reporting.heatmaps import Thumbnails, strip
from reporting.pictures import write_picture
from reporting.report import Threshold, write_report
from reporting.sheet import write_sheet
from utils.errors import InputError
from utils.files import PROGRAM, atomic_write, read_json, write_json, write_text
from utils.safe_text import safe_cell
from utils.signals import stoppable

REPORT, SHEET = "report.html", "sheet.jpg"


def average_path(results_dir: Path, name: str) -> Path:
    """Where the average over categories goes; raises InputError if another program's file is there."""
    path = results_dir / f"average_{name}.json"
    if path.exists() and read_json(path).get("program") != PROGRAM:
        raise InputError(f"{path} was not written by USAD; move it or choose another --results-dir")
    return path


def write_average(path: Path, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write each figure's mean over the categories where it is defined, and the figures of each category."""
    average = {}
    for key in protocols():
        values = [part[key] for part in metrics.values() if part[key] is not None]
        average[key] = float(np.mean(values)) if values else None
    counts = {key: sum(part[key] for part in metrics.values()) for key in ("n_images", "n_anomalous")}
    write_json(path, {"program": PROGRAM, **average, **counts, "categories": metrics})
    return {**average, **counts}


def write_scores(path: Path, results: Results, branches: Sequence[str]) -> None:
    """scores.csv: path, label and score of each test image, followed by the scores of the `branches` of a fusion."""
    main = next(iter(results.scores))
    columns = [results.scores[part] for part in (main, *branches)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "score", *branches])
    for row, sample in enumerate(results.samples):
        writer.writerow([safe_cell(sample.name), sample.label, *(repr(float(values[row])) for values in columns)])
    write_text(path, text.getvalue())


def write_map(folder: Path, sample: Sample, anomaly_map: np.ndarray) -> None:
    """The raw float32 map [S, S] as <folder>/<defect>/<stem>.tiff, in the same sub-folders as the image."""
    content = io.BytesIO()  # on a full disk Pillow would write half a TIFF without an error
    Image.fromarray(anomaly_map).save(content, "TIFF")
    with atomic_write(_result_path(folder, sample, ".tiff")) as temporary:
        temporary.write_bytes(content.getvalue())


def write_heatmaps(folder: Path, samples: Sequence[Sample], thumbnails: Thumbnails, scale: tuple[float, float]) -> None:
    """One strip for each test image, <folder>/<defect>/<stem>.png, all on one colour scale."""
    pairs = zip(samples, thumbnails, strict=True)
    bar = tqdm(pairs, desc="heat maps", total=len(samples), unit="image", leave=False, disable=None)
    for sample, image in stoppable(bar):
        write_picture(_result_path(folder, sample, ".png"), strip(sample, image, scale))


def write_test_report(
    folder: Path, results: Results, metrics: dict[str, Any], threshold: Threshold | None, config: dict[str, Any]
) -> None:
    """report.html and sheet.jpg of a fusion's test; without a threshold they show that of the highest F1, and say so.

    Without any threshold there is no sheet.
    """
    settings = config.get("settings", {})
    weights = sorted({branch["backbone"]["weights"] for branch in config.get("branches", {}).values()})
    facts = {
        "images": str(metrics["n_images"]),
        "anomalous": str(metrics["n_anomalous"]),
        **{key: str(settings[key]) for key in ("fusion",) if key in settings},
        **({"region of interest": f"{config['roi_share']:.0%} of the frame"} if config.get("roi_share") else {}),
        **({"networks": ", ".join(weights).replace("random", "untrained")} if weights else {}),
        "device": config["device"],
    }
    title = str(settings.get("category", folder.parent.name))
    threshold = threshold or results.best_threshold()
    write_report(folder / REPORT, title, results.gallery, metrics, results.curves(), threshold, config, facts)
    if threshold:
        write_sheet(folder / SHEET, title, results.gallery, threshold)
    else:
        (folder / SHEET).unlink(missing_ok=True)


def _result_path(folder: Path, sample: Sample, suffix: str) -> Path:
    return (folder / Path(sample.name).relative_to("test")).with_suffix(suffix)
