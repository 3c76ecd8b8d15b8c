"""The one evaluation: a model (branch or fusion) over test images, its metrics and its files."""

from __future__ import annotations

import csv
import io
import json
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.images import read_image, read_mask
from datasets.mvtec import ImageLoader, Item
from models.operating_point import OperatingPoint
from utils.errors import InputError
from utils.files import atomic_write, check_writable, write_json, write_text
from utils.gallery import Entry, Gallery, Pictures
from utils.metrics import PROTOCOLS, PixelMetrics, image_curves, image_f1_threshold, image_metrics
from utils.report import Curves, Threshold, write_report
from utils.tables import safe_cell
from utils.timing import Stopwatch, peak_memory_mb
from utils.visualize import color_scale, strip, thumbnail, write_png

REPORT = "report.html"
PROGRAM = "usad"  # the mark by which a later run knows its own files


class Results:
    """Scores, metrics and small maps of a test run, by part (a branch's name, or `fusion`).

    With `report`, the pictures of a report are kept, too.
    """

    def __init__(self, items: list[Item], report: bool = False) -> None:
        self.items = items
        self.gallery = Gallery(len(items)) if report else None
        self.scores: dict[str, list[np.ndarray]] = {}
        self.pixels: dict[str, PixelMetrics] = {}
        self.thumbnails: list[np.ndarray] = []

    def add(self, parts: dict[str, tuple[torch.Tensor, torch.Tensor]], batch: dict[str, Any]) -> np.ndarray:
        """Take in the parts of a batch, the main one first; returns the main maps [B, S, S]."""
        main, values = None, {}
        for name, (scores, maps) in parts.items():
            scores, maps = scores.double().cpu().numpy(), maps.float().cpu().numpy()
            finite = np.isfinite(scores) & np.isfinite(maps).all((1, 2))
            if not finite.all():
                item = self.items[int(batch["index"][int(np.argmin(finite))])]
                raise InputError(
                    f"{name} gives a score or map that is not finite on {item.path}; check the weights"
                )
            self.scores.setdefault(name, []).append(scores)
            self.pixels.setdefault(name, PixelMetrics()).update(
                maps, batch["mask"].numpy(), batch["label"].numpy() == 1
            )
            main = maps if main is None else main
            values[name] = scores, maps
        self.thumbnails.extend(thumbnail(image) for image in main)
        if self.gallery is not None:
            for row, index in enumerate(batch["index"]):
                self._keep(
                    self.items[int(index)], {name: (s[row], m[row]) for name, (s, m) in values.items()}
                )
        return main

    def _keep(self, item: Item, parts: dict[str, tuple[float, np.ndarray]]) -> None:
        def pictures() -> Pictures:
            image = read_image(item.path)
            truth = None if item.mask is None else np.asarray(read_mask(item.mask, image.size)) >= 128
            return Pictures(np.asarray(image), {name: part for name, (_, part) in parts.items()}, truth)

        scores = {name: float(score) for name, (score, _) in parts.items()}
        self.gallery.add(Entry(item.name, scores, item.label, item.path.parent.name), pictures)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """By part: every figure of metrics.json; a figure that is undefined is None."""
        labels = np.array([item.label for item in self.items])
        counts = {"n_images": len(labels), "n_anomalous": int(labels.sum())}
        return {
            name: {
                **image_metrics(np.concatenate(scores), labels),
                **self.pixels[name].compute(),
                **counts,
            }
            for name, scores in self.scores.items()
        }

    def curves(self) -> Curves:
        """By part, the points of the curves that a report draws."""
        labels = np.array([item.label for item in self.items])
        curves = {}
        for name, scores in self.scores.items():
            image, pixel = image_curves(np.concatenate(scores), labels), self.pixels[name].curves(400)
            named = {
                f"{kind}_{key}": points
                for kind, of in (("image", image), ("pixel", pixel))
                for key, points in of.items()
            }
            curves[name] = {key: tuple(points.values()) for key, points in named.items()}
        return curves

    def best_threshold(self) -> Threshold | None:
        """The thresholds of the highest F1 on these very images; None where they are undefined."""
        labels = np.array([item.label for item in self.items])
        main = next(iter(self.scores))
        score = image_f1_threshold(np.concatenate(self.scores[main]), labels)
        if score is None:
            return None
        source = "highest F1 of images, and of pixels for the contour"
        return Threshold(score, self.pixels[main].f1_threshold(), source, on_test_set=True)


def evaluate(
    model: Any,
    loader: ImageLoader,
    folder: Path,
    config: dict[str, Any],
    images: bool = True,
    save_maps: bool = False,
    operating_point: OperatingPoint | None = None,
) -> dict[str, Any]:
    """Run `model` over the test images and write metrics, scores, config, maps, heat maps and report.

    `model` has `predict_parts(images [B, 3, S, S]) -> {name: (scores [B], maps [B, S, S])}`, its own part first,
    and `stopwatches() -> {name: Stopwatch}`. A model of several branches gets a report, with the thresholds of
    `operating_point` or, without one, those of the highest F1. Returns the metrics.
    """
    start = time.perf_counter()
    items = loader.dataset.items
    results, watch = Results(items, report=images and hasattr(model, "branches")), Stopwatch()
    for batch in _timed(loader, watch):
        parts = model.predict_parts(batch["image"].to(model.device, non_blocking=True))
        with watch("collect"):
            maps = results.add(parts, batch)
            if save_maps:
                _mark(folder)
                for index, anomaly_map in zip(batch["index"], maps, strict=True):
                    _write_map(_result_path(folder / "anomaly_maps", items[int(index)], ".tiff"), anomaly_map)
    with watch("metrics"):
        by_part = results.metrics()
    _mark(folder)
    if images:
        with watch("images"):
            _write_heatmaps(folder / "heatmaps", results)
    main, *others = by_part
    metrics = dict(by_part[main])
    if operating_point:
        labels = np.array([item.label for item in items])
        metrics["operating_point"] = operating_point.on_test(np.concatenate(results.scores[main]), labels)
    if others:
        metrics["branches"] = {name: by_part[name] for name in others}
    timings = {**watch.seconds, **_stage_seconds(model), "total": time.perf_counter() - start}
    write_text(folder / "scores.csv", _scores_csv(results))
    write_json(folder / "metrics.json", metrics)
    config = {**config, **environment(model), "seconds": _rounded(timings)}
    write_json(folder / "config.json", config)
    if results.gallery is not None:
        _write_report(folder, results, metrics, operating_point, config)
    else:
        (folder / REPORT).unlink(missing_ok=True)  # its figures would be an earlier run's
    return metrics


def claim_folder(folder: Path) -> None:
    """Raise InputError if `folder` holds files, but not those of an earlier run; see also `check_writable`."""
    check_writable(folder)
    used = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    if used and not _is_ours(folder / "config.json"):
        raise InputError(
            f"{folder} holds files that USAD did not write; move them or choose another --results-dir"
        )


def average_path(results_dir: Path, name: str) -> Path:
    """Where the average over categories goes; raises InputError if it holds another program's file."""
    path = results_dir / f"average_{name}.json"
    if path.exists() and not _is_ours(path):
        raise InputError(f"{path} was not written by USAD; move it or choose another --results-dir")
    return path


def _mark(folder: Path) -> None:
    """Leave our mark before the first result: what an interrupted run leaves is ours, too."""
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", {"program": PROGRAM})


def _is_ours(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["program"] == PROGRAM
    except (OSError, ValueError, KeyError, TypeError):
        return False


def environment(model: Any) -> dict[str, Any]:
    """What a number depends on beside the settings: program, versions, device, peak memory."""
    import timm
    import torchvision

    device = torch.device(model.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "program": PROGRAM,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
        },
        "device": f"{device} ({name})",
        "peak_memory_mb": peak_memory_mb(),
    }


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """One line a figure, with the protocol it follows; branches, if any, in columns beside the fusion."""
    columns = {title: metrics, **metrics.get("branches", {})}
    print("".join(f"{name:>12}" for name in columns))
    for key, protocol in PROTOCOLS.items():
        cells = "".join(
            f"{'-' if part[key] is None else format(part[key], '.4f'):>12}" for part in columns.values()
        )
        print(f"{cells}  {protocol}")
    print(f"{metrics['n_images']} images, {metrics['n_anomalous']} anomalous", flush=True)
    if point := metrics.get("operating_point"):
        recall = "-" if point["recall"] is None else f"{point['recall']:.4f}"
        print(
            f"at the threshold for {point['false_alarm_rate']:g} false alarms: recall {recall}, "
            f"{point['false_alarms']} false alarms among {metrics['n_images'] - metrics['n_anomalous']} normal images",
            flush=True,
        )


def write_average(path: Path, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the mean over categories of every figure that is defined in one at least, and the categories' own."""
    average = {}
    for key in PROTOCOLS:
        values = [part[key] for part in metrics.values() if part[key] is not None]
        average[key] = float(np.mean(values)) if values else None
    counts = {key: sum(part[key] for part in metrics.values()) for key in ("n_images", "n_anomalous")}
    write_json(path, {"program": PROGRAM, **average, **counts, "categories": metrics})
    return {**average, **counts}


def _timed(loader: Iterable[dict[str, Any]], watch: Stopwatch) -> Iterator[dict[str, Any]]:
    batches = iter(loader)
    while True:
        with watch("load"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _stage_seconds(model: Any) -> dict[str, Any]:
    branches = {name: dict(watch.seconds) for name, watch in model.stopwatches().items()}
    stages = {
        stage: sum(times.get(stage, 0.0) for times in branches.values()) for stage in ("extract", "score")
    }
    return {**stages, "branches": branches}


def _rounded(value: Any) -> Any:
    return (
        {key: _rounded(entry) for key, entry in value.items()} if isinstance(value, dict) else round(value, 4)
    )


def _scores_csv(results: Results) -> str:
    columns = {name: np.concatenate(scores) for name, scores in results.scores.items()}
    main, *others = columns
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "score", *others])
    for row, item in enumerate(results.items):
        writer.writerow(
            [safe_cell(item.name), item.label, *(repr(float(values[row])) for values in columns.values())]
        )
    return text.getvalue()


def _result_path(folder: Path, item: Item, suffix: str) -> Path:
    return folder / item.path.parent.name / f"{item.path.stem}{suffix}"


def _write_report(
    folder: Path,
    results: Results,
    metrics: dict[str, Any],
    operating_point: OperatingPoint | None,
    config: dict[str, Any],
) -> None:
    if point := operating_point:
        threshold = Threshold(point.threshold, point.pixel_threshold, point.source)
    else:
        threshold = results.best_threshold()
    settings = config.get("settings", {})
    facts = {
        "images": str(metrics["n_images"]),
        "anomalous": str(metrics["n_anomalous"]),
        **{key: str(settings[key]) for key in ("fusion",) if key in settings},
        "device": config["device"],
    }
    title = str(settings.get("category", folder.parent.name))
    write_report(folder / REPORT, title, results.gallery, metrics, results.curves(), threshold, config, facts)


def _write_map(path: Path, anomaly_map: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(anomaly_map).save(temporary)


def _write_heatmaps(folder: Path, results: Results) -> None:
    from tqdm import tqdm

    scale = color_scale(results.thumbnails)
    pairs = list(zip(results.items, results.thumbnails, strict=True))
    for item, image in tqdm(pairs, desc="heat maps", unit="image", leave=False, disable=None):
        write_png(_result_path(folder, item, ".png"), strip(item, image, scale))
