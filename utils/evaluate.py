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

from datasets.mvtec import ImageLoader, Item
from utils.errors import InputError
from utils.files import atomic_write, write_json, write_text
from utils.metrics import PixelMetrics, image_metrics
from utils.timing import Stopwatch, peak_memory_mb
from utils.visualize import color_scale, strip, thumbnail, write_png

PROTOCOLS = {
    "image_auroc": "image AUROC",
    "image_ap": "image average precision",
    "image_f1_max": "image F1, best threshold",
    "pixel_auroc": "pixel AUROC, all test pixels",
    "pixel_ap": "pixel average precision",
    "pixel_f1_max": "pixel F1, best threshold",
    "aupro": "AUPRO, all images, exact thresholds, FPR limit 0.3",
    "pro_as_published": "PRO, the authors' protocol (anomalous images, maps scaled one by one)",
}


class Results:
    """Scores, metrics and small maps of a test run, by part (a branch's name, or `fusion`)."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self.scores: dict[str, list[np.ndarray]] = {}
        self.pixels: dict[str, PixelMetrics] = {}
        self.thumbnails: list[np.ndarray] = []

    def add(self, parts: dict[str, tuple[torch.Tensor, torch.Tensor]], batch: dict[str, Any]) -> np.ndarray:
        """Take in the parts of a batch, the main one first; returns the main maps [B, S, S]."""
        main = None
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
        self.thumbnails.extend(thumbnail(image) for image in main)
        return main

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


def evaluate(
    model: Any,
    loader: ImageLoader,
    folder: Path,
    config: dict[str, Any],
    images: bool = True,
    save_maps: bool = False,
) -> dict[str, Any]:
    """Run `model` over the test images and write metrics.json, scores.csv, config.json, maps and heat maps.

    `model` has `predict_parts(images [B, 3, S, S]) -> {name: (scores [B], maps [B, S, S])}`, its own part first, and
    `stopwatches() -> {name: Stopwatch}`. Returns the metrics.
    """
    start = time.perf_counter()
    items = loader.dataset.items
    results, watch = Results(items), Stopwatch()
    for batch in _timed(loader, watch):
        parts = model.predict_parts(batch["image"].to(model.device, non_blocking=True))
        with watch("collect"):
            maps = results.add(parts, batch)
            if save_maps:
                for index, anomaly_map in zip(batch["index"], maps, strict=True):
                    _write_map(_result_path(folder / "anomaly_maps", items[int(index)], ".tiff"), anomaly_map)
    with watch("metrics"):
        by_part = results.metrics()
    if images:
        with watch("images"):
            _write_heatmaps(folder / "heatmaps", results)
    main, *others = by_part
    metrics = dict(by_part[main])
    if others:
        metrics["branches"] = {name: by_part[name] for name in others}
    timings = {**watch.seconds, **_stage_seconds(model), "total": time.perf_counter() - start}
    write_text(folder / "scores.csv", _scores_csv(results))
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "config.json", {**config, **environment(model), "seconds": _rounded(timings)})
    return metrics


def claim_folder(folder: Path) -> None:
    """Raise InputError if `folder` holds results that this program did not write."""
    ours = any((folder / name).exists() for name in ("metrics.json", "scores.csv", "config.json"))
    if not ours:
        return
    try:
        program = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("program")
    except (OSError, ValueError, AttributeError):
        program = None
    if program != "usad":
        raise InputError(
            f"{folder} holds files that USAD did not write; move them or choose another --results-dir"
        )


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
        "program": "usad",
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


def write_average(path: Path, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the mean over categories of every figure that is defined in one at least, and the categories' own."""
    average = {}
    for key in PROTOCOLS:
        values = [part[key] for part in metrics.values() if part[key] is not None]
        average[key] = float(np.mean(values)) if values else None
    counts = {key: sum(part[key] for part in metrics.values()) for key in ("n_images", "n_anomalous")}
    write_json(path, {**average, **counts, "categories": metrics})
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
        writer.writerow([item.name, item.label, *(repr(float(values[row])) for values in columns.values())])
    return text.getvalue()


def _result_path(folder: Path, item: Item, suffix: str) -> Path:
    return folder / item.path.parent.name / f"{item.path.stem}{suffix}"


def _write_map(path: Path, anomaly_map: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(anomaly_map).save(temporary)


def _write_heatmaps(folder: Path, results: Results) -> None:
    from tqdm import tqdm

    scale = color_scale(results.thumbnails)
    written = set()
    pairs = zip(results.items, results.thumbnails, strict=True)
    for item, image in tqdm(pairs, total=len(results.items), desc="heat maps", unit="image", leave=False):
        path = _result_path(folder, item, ".png")
        write_png(path, strip(item, image, scale))
        written.add(path)
    for stale in set(folder.glob("*/*.png")) - written:
        stale.unlink()
