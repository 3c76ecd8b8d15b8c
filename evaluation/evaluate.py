"""The one evaluation: a model (branch or fusion) over test images, its metrics and its files."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.loading import ImageLoader
from evaluation.result_files import (
    PROGRAM,
    REPORT,
    mark_folder,
    write_heatmaps,
    write_map,
    write_scores,
    write_test_report,
)
from evaluation.results import Results
from metrics.metrics import PROTOCOLS
from models.fusion.operating_point import OperatingPoint
from reporting.cards import Threshold
from reporting.visualize import Thumbnails
from utils.distributed import barrier, from_first, size
from utils.files import write_json
from utils.timing import Stopwatch, peak_memory_mb, processor


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

    Of several processes each tests its share of the images and writes their maps and heat maps; the first writes all
    else, and it alone has the metrics.
    """
    start = time.perf_counter()
    samples, shard = loader.dataset.samples, loader.shard
    thumbnails = Thumbnails(folder, len(samples)) if images else None
    report = images and hasattr(model, "branches")
    results, watch = Results(samples, model.stopwatches(), shard.start, report, thumbnails), Stopwatch()
    for batch in timed(loader, watch):
        parts = model.predict_parts(batch["image"].to(model.device, non_blocking=True))
        with watch("collect"):
            maps = results.add(parts, batch)
            if save_maps:
                mark_folder(folder)
                for index, anomaly_map in zip(batch["index"], maps, strict=True):
                    write_map(folder / "anomaly_maps", samples[int(index)], anomaly_map)
    with watch("collect"):
        first = results.collect()
    mark_folder(folder)
    if images:
        with watch("images"):
            scale = from_first(lambda: {"scale": np.array(thumbnails.scale())})["scale"].tolist()
            write_heatmaps(folder / "heatmaps", samples[shard.start : shard.stop], thumbnails, scale)
            barrier()
    if not first:
        return {}
    with watch("metrics"):
        by_part = results.metrics()
    main, *others = by_part
    metrics = dict(by_part[main])
    if operating_point:
        labels = np.array([item.label for item in samples])
        metrics["operating_point"] = operating_point.on_test(results.scores[main], labels)
    if others:
        metrics["branches"] = {name: by_part[name] for name in others}
    timings = {**watch.seconds, **stage_seconds(model), "total": time.perf_counter() - start}
    write_scores(folder / "scores.csv", results)
    write_json(folder / "metrics.json", metrics)
    config = {**config, **environment(model), "seconds": _rounded(timings)}
    write_json(folder / "config.json", config)
    if results.gallery is not None:
        point = operating_point
        threshold = point and Threshold(point.threshold, point.pixel_threshold, point.source)
        write_test_report(folder, results, metrics, threshold, config)
    else:
        (folder / REPORT).unlink(missing_ok=True)  # its figures would be an earlier run's
    return metrics


def environment(model: Any) -> dict[str, Any]:
    """What a number depends on beside the settings: program, versions, device, peak memory."""
    import timm
    import torchvision

    device = torch.device(model.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
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
        "processes": size(),
        "peak_memory_mb": peak_memory_mb(),
    }


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """One line a figure, with the protocol it follows; branches, if any, in columns beside the fusion."""
    columns = {title: metrics, **metrics.get("branches", {})}
    print("".join(f"{name:>12}" for name in columns))
    for key, protocol in PROTOCOLS.items():
        cells = "".join(f"{'-' if part[key] is None else format(part[key], '.4f'):>12}" for part in columns.values())
        print(f"{cells}  {protocol}")
    print(f"{metrics['n_images']} images, {metrics['n_anomalous']} anomalous", flush=True)
    if point := metrics.get("operating_point"):
        recall = "-" if point["recall"] is None else f"{point['recall']:.4f}"
        print(
            f"at the threshold for {point['false_alarm_rate']:g} false alarms: recall {recall}, "
            f"{point['false_alarms']} false alarms among {metrics['n_images'] - metrics['n_anomalous']} normal images",
            flush=True,
        )


def timed(loader: Iterable[dict[str, Any]], watch: Stopwatch) -> Iterator[dict[str, Any]]:
    """The loader's batches; `watch` takes the time of waiting for each as "load"."""
    batches = iter(loader)
    while True:
        with watch("load"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def stage_seconds(model: Any) -> dict[str, Any]:
    """Seconds of the stages "extract" and "score", of all branches together and of each."""
    branches = {name: dict(watch.seconds) for name, watch in model.stopwatches().items()}
    stages = {stage: sum(times.get(stage, 0.0) for times in branches.values()) for stage in ("extract", "score")}
    return {**stages, "branches": branches}


def _rounded(value: Any) -> Any:
    return {key: _rounded(entry) for key, entry in value.items()} if isinstance(value, dict) else round(value, 4)
