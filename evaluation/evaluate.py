"""Runs a model (a branch or a fusion) over the test images, measures it and writes its files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.loading import ImageLoader
from evaluation.result_files import (
    REPORT,
    SHEET,
    write_average,
    write_heatmaps,
    write_map,
    write_scores,
    write_test_report,
)
from evaluation.results import Results
from metrics import protocols
from models.branches.branch import AS_PUBLISHED, Branch
from models.branches.part import Part
from models.fusion.operating_point import OperatingPoint
from models.fusion.usad import USAD
from reporting.heatmaps import Thumbnails
from reporting.report import Threshold
from utils.distributed import is_main_process
from utils.files import PROGRAM, mark_folder, write_json
from utils.gather import barrier, from_first
from utils.gpu import ReadBack
from utils.machine import environment
from utils.timing import Stopwatch


def evaluate(
    model: Branch | USAD,
    loader: ImageLoader,
    folder: Path,
    config: dict[str, Any],
    images: bool = True,
    save_maps: bool = False,
    operating_point: OperatingPoint | None = None,
) -> dict[str, Any]:
    """Run `model` over the test images and write metrics, scores, config, maps, heat maps and report.

    `model` is a branch or their fusion. A fusion gets a report, with the thresholds of `operating_point` or, without
    one, those of the highest F1. Returns the metrics.

    With several processes, each tests its share of the images and writes their maps and heat maps. The main process
    writes everything else, and only it has the metrics.
    """
    start = time.perf_counter()
    samples, shard = loader.dataset.samples, loader.shard
    thumbnails = Thumbnails(folder, len(samples)) if images else None
    report = images and isinstance(model, USAD)
    results, watch = Results(samples, model.parts(), shard.start, report, thumbnails, model.roi), Stopwatch()
    for batch, parts in predicted(model, loader, watch):
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
    if isinstance(model, USAD):
        metrics["branches"] = {name: by_part[name] for name in others}
    else:
        scaled = by_part[AS_PUBLISHED]
        metrics[AS_PUBLISHED] = {key: scaled[key] for key in scaled if not key.startswith(("image_", "n_"))}
    timings = {**watch.seconds, **stage_seconds(model), "total": time.perf_counter() - start}
    write_scores(folder / "scores.csv", results, others if isinstance(model, USAD) else [])
    write_json(folder / "metrics.json", metrics)
    config = {"program": PROGRAM, **config, **environment(model.device), "seconds": _rounded(timings)}
    write_json(folder / "config.json", config)
    if results.gallery is not None:
        point = operating_point
        threshold = point and Threshold(point.threshold, point.pixel_threshold, point.source)
        write_test_report(folder, results, metrics, threshold, config)
    else:
        for name in (REPORT, SHEET):
            (folder / name).unlink(missing_ok=True)  # it would show the figures of an earlier run
    return metrics


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """Print one line for each figure, with the protocol that it follows.

    Columns beside the first: the branches of a fusion, or the figures of a branch with maps scaled as in the paper.
    """
    others = {"scaled maps": metrics[AS_PUBLISHED]} if AS_PUBLISHED in metrics else metrics.get("branches", {})
    columns = {title: metrics, **others}
    print("".join(f"{name:>12}" for name in columns))
    for key, protocol in protocols().items():
        figures = [part.get(key) for part in columns.values()]
        cells = "".join(f"{'-' if figure is None else format(figure, '.4f'):>12}" for figure in figures)
        print(f"{cells}  {protocol}")
    print(f"{metrics['n_images']} images, {metrics['n_anomalous']} anomalous", flush=True)
    if point := metrics.get("operating_point"):
        recall = "-" if point["recall"] is None else f"{point['recall']:.4f}"
        print(
            f"at the threshold for {point['false_alarm_rate']:g} false alarms: recall {recall}, "
            f"{point['false_alarms']} false alarms among {metrics['n_images'] - metrics['n_anomalous']} normal images",
            flush=True,
        )


def print_average(title: str, path: Path, metrics: dict[str, dict[str, Any]]) -> None:
    """Write and print the mean over the categories, if there are several."""
    if len(metrics) > 1 and is_main_process():
        print(f"average of {len(metrics)} categories")
        print_metrics(title, write_average(path, metrics))


def predicted(
    model: Branch | USAD, loader: ImageLoader, watch: Stopwatch
) -> Iterator[tuple[dict[str, Any], dict[str, Part]]]:
    """Batches, and the model's parts of each on the host; `watch` takes the time of waiting for batches as "load".

    A GPU computes the next batch while one is taken in. Its first pass, which takes a second, is made on zeros while
    the workers read the first batch.
    """
    if torch.device(model.device).type != "cuda":
        for batch in timed(loader, watch):
            yield batch, model.predict_parts(batch["image"])
        return
    size = min(loader.loader.batch_size, len(loader.shard))
    if size:
        zeros = torch.zeros(size, 3, model.image_size, model.image_size, device=model.device)
        loader.meanwhile = partial(model.predict_parts, zeros)
    previous = None
    for batch in timed(loader, watch):
        read_back = ReadBack(model.predict_parts(batch["image"].to(model.device, non_blocking=True)), model.device)
        if previous:
            yield previous[0], previous[1].wait()
        previous = batch, read_back
    if previous:
        yield previous[0], previous[1].wait()


def timed(loader: Iterable[dict[str, Any]], watch: Stopwatch) -> Iterator[dict[str, Any]]:
    """The loader's batches; `watch` counts the time of waiting for them as "load"."""
    batches = iter(loader)
    while True:
        with watch("load"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def stage_seconds(model: Any) -> dict[str, Any]:
    """Seconds of the stages "extract" and "score", for all branches together and for each."""
    branches = {name: dict(watch.seconds) for name, watch in model.stopwatches().items()}
    stages = {stage: sum(times.get(stage, 0.0) for times in branches.values()) for stage in ("extract", "score")}
    return {**stages, "branches": branches}


def _rounded(value: Any) -> Any:
    return {key: _rounded(entry) for key, entry in value.items()} if isinstance(value, dict) else round(value, 4)
