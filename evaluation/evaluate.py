"""Runs a model (a branch or a fusion) over the test images, measures it and writes its files."""

import csv
import io
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.loading import ImageLoader
from datasets.mvtec import Sample
from evaluation.results import Results
from metrics import protocols
from models.branches.branch import AS_PUBLISHED, Branch
from models.branches.part import Part
from models.fusion.usad import USAD
from reporting.heatmaps import Thumbnails, strip
from reporting.pictures import write_picture
from reporting.report import Threshold, write_report
from reporting.sheet import write_sheet
from utils.distributed import is_main_process
from utils.errors import InputError
from utils.files import PROGRAM, atomic_write, mark_folder, read_json, write_csv, write_json
from utils.gather import barrier, from_first
from utils.gpu import ReadBack
from utils.machine import environment
from utils.safe_text import safe_cell
from utils.signals import stoppable
from utils.timing import Stopwatch

REPORT, SHEET = "report.html", "sheet.jpg"


def evaluate(
    model: Branch | USAD,
    loader: ImageLoader,
    folder: Path,
    config: dict[str, Any],
    images: bool = True,
    save_maps: bool = False,
) -> dict[str, Any]:
    """Run `model` over the test images; write metrics, scores, config, maps, heat maps and report; print the metrics.

    A fusion gets a report, with the thresholds of its operating point or, without one, those of the highest F1. With
    several processes, each tests its share of the images and writes their maps and heat maps; the main process
    writes everything else, and only it returns the metrics.
    """
    start = time.perf_counter()
    samples, shard = loader.dataset.samples, loader.shard
    thumbnails = Thumbnails(folder, len(samples)) if images else None
    fusion = isinstance(model, USAD)
    point = model.operating_point if fusion else None
    results, watch = Results(samples, model.parts(), shard.start, images and fusion, thumbnails, model.roi), Stopwatch()
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
    if point:
        labels = np.array([item.label for item in samples])
        metrics["operating_point"] = point.on_test(results.scores[main], labels)
    if fusion:
        metrics["branches"] = {name: by_part[name] for name in others}
    else:
        scaled = by_part[AS_PUBLISHED]
        metrics[AS_PUBLISHED] = {key: scaled[key] for key in scaled if not key.startswith(("image_", "n_"))}
    timings = {**watch.seconds, **stage_seconds(model), "total": time.perf_counter() - start}
    former, tested = images_in(folder / "scores.csv"), [sample.name for sample in samples]
    write_scores(folder / "scores.csv", results, others if fusion else [])
    write_json(folder / "metrics.json", metrics)
    config = {"program": PROGRAM, **config, **environment(model.device), "seconds": _rounded(timings)}
    write_json(folder / "config.json", config)
    if results.gallery is not None:
        threshold = point and Threshold(point.threshold, point.pixel_threshold, point.source)
        write_test_report(folder, results, metrics, threshold or results.best_threshold(), config)
    stale = set() if results.gallery is not None else {folder / REPORT, folder / SHEET}  # they show an earlier run
    for name, suffix, wanted in (("heatmaps", ".png", images), ("anomaly_maps", ".tiff", save_maps)):
        found = set((folder / name).rglob(f"*{suffix}"))
        before, now = ({_result_path(folder / name, image, suffix) for image in some} for some in (former, tested))
        stale |= found & (before - now) if wanted else found
    for path in stale:
        path.unlink(missing_ok=True)
    print_metrics(model.name, metrics)
    print(f"{folder.parent.name}: results in {folder}", flush=True)
    return metrics


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


def write_scores(path: Path, results: Results, branches: Sequence[str]) -> None:
    """scores.csv: path, label and score of each test image, followed by the scores of the `branches` of a fusion."""
    main = next(iter(results.scores))
    columns = [results.scores[part] for part in (main, *branches)]
    rows = [["path", "label", "score", *branches]]
    for row, sample in enumerate(results.samples):
        rows.append([safe_cell(sample.name), sample.label, *(float(values[row]) for values in columns)])
    write_csv(path, rows)


def images_in(path: Path) -> set[str]:
    """The images in the scores.csv of an earlier run; none if there is no such file."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["path"] for row in csv.DictReader(file) if row["path"].startswith("test/")}
    except (OSError, ValueError, KeyError, csv.Error):
        return set()


def write_map(folder: Path, sample: Sample, anomaly_map: np.ndarray) -> None:
    """The raw float32 map [S, S] as <folder>/<defect>/<stem>.tiff, in the same sub-folders as the image."""
    content = io.BytesIO()  # on a full disk Pillow would write half a TIFF without an error
    Image.fromarray(anomaly_map).save(content, "TIFF")
    with atomic_write(_result_path(folder, sample.name, ".tiff")) as temporary:
        temporary.write_bytes(content.getvalue())


def write_heatmaps(folder: Path, samples: Sequence[Sample], thumbnails: Thumbnails, scale: tuple[float, float]) -> None:
    """One strip for each test image, <folder>/<defect>/<stem>.png, all on one colour scale."""
    pairs = zip(samples, thumbnails, strict=True)
    bar = tqdm(pairs, desc="heat maps", total=len(samples), unit="image", leave=False, disable=None)
    for sample, image in stoppable(bar):
        write_picture(_result_path(folder, sample.name, ".png"), strip(sample, image, scale))


def write_test_report(
    folder: Path, results: Results, metrics: dict[str, Any], threshold: Threshold | None, config: dict[str, Any]
) -> None:
    """report.html and, if there is a threshold, sheet.jpg of a fusion's test."""
    weights = sorted({branch["backbone"]["weights"] for branch in config["branches"].values()})
    facts = {
        "images": str(metrics["n_images"]),
        "anomalous": str(metrics["n_anomalous"]),
        "fusion": config["settings"]["fusion"],
        **({"region of interest": f"{config['roi_share']:.0%} of the frame"} if config["roi_share"] else {}),
        "networks": ", ".join(weights).replace("random", "untrained"),
        "device": config["device"],
    }
    title = config["settings"]["category"]
    write_report(folder / REPORT, title, results.gallery, metrics, results.curves(), threshold, config, facts)
    if threshold:
        write_sheet(folder / SHEET, title, results.gallery, threshold)
    else:
        (folder / SHEET).unlink(missing_ok=True)


def _result_path(folder: Path, image: str, suffix: str) -> Path:
    return (folder / Path(image).relative_to("test")).with_suffix(suffix)


def print_metrics(title: str, metrics: dict[str, Any]) -> None:
    """Print a line for each figure, with columns for the branches of a fusion, or for the scaled maps of a branch."""
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
            f"at the threshold for a false-alarm rate of {point['false_alarm_rate']:g}: recall {recall}, "
            f"{point['false_alarms']} false alarms among {metrics['n_images'] - metrics['n_anomalous']} normal images",
            flush=True,
        )


def average_path(results_dir: Path, name: str) -> Path:
    """Where the average over categories goes; raises InputError if another program's file is there."""
    path = results_dir / f"average_{name}.json"
    if path.exists() and read_json(path).get("program") != PROGRAM:
        raise InputError(f"{path} was not written by USAD; move it or choose another --results-dir")
    return path


def average(title: str, path: Path, metrics: dict[str, dict[str, Any]]) -> None:
    """Write and print each figure's mean over the categories where it is defined, if there are several categories."""
    if len(metrics) < 2 or not is_main_process():
        return
    means = {}
    for key in protocols():
        values = [part[key] for part in metrics.values() if part[key] is not None]
        means[key] = float(np.mean(values)) if values else None
    means |= {key: sum(part[key] for part in metrics.values()) for key in ("n_images", "n_anomalous")}
    write_json(path, {"program": PROGRAM, **means, "categories": metrics})
    print(f"average of {len(metrics)} categories")
    print_metrics(title, means)
