"""How fast, and in how much memory: each branch and the fusion in a process of its own."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from datasets.images import Decoding
from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Sample
from evaluation.evaluate import stage_seconds, timed
from experiments.cells import Cell, Row, Section, Table, Unavailable
from experiments.fusions import Bench, Fusion
from models import BRANCHES, USAD
from models.fusion.checkpoints import checkpoint_digests, checkpoint_paths
from utils.machine import environment
from utils.processes import ProcessFailed, answer, run_module
from utils.timing import Stopwatch

IMAGES = 200  # the most that are timed
FIGURES = {
    "images_per_second": "images/s",
    "load": "load, s/image",
    "extract": "extract, s/image",
    "score": "score, s/image",
    "memory": "peak memory, MB",
    "gpu_memory": "on the GPU, MB",
    "checkpoint": "checkpoint, MB",
}


def speed(bench: Bench, fusion: Fusion, folder: Path) -> Table:
    """Each branch of the checkpoints in `folder`, and their fusion."""
    run = bench.measurements.run
    samples = bench.images.samples[:: -(-len(bench.images.samples) // IMAGES)]
    rows = []
    for name in (*fusion.parts, USAD.name):
        job = {
            "part": name,
            "folder": str(folder.absolute()),
            "device": run.device,
            "precision": run.precision,
            "weights": {key: file and str(Path(file).absolute()) for key, file in bench.measurements.weights.items()},
            "batch_size": run.batch_size,
            "fusion": fusion.settings,
            "images": [str(sample.path.absolute()) for sample in samples],
            "decoding": dataclasses.asdict(samples[0].decoding),
        }
        needs = {**job, "checkpoints": checkpoint_digests(folder), "machine": machine(run.device), "speed": 1}
        rows.append(Row({"model": name}, [(Cell(needs, lambda job=job: measure_apart(job)),)]))
    remarks = [
        f"{machine(run.device)}; batches of {run.batch_size}; {len(samples)} test images after a batch to warm up. "
        "Each row is a process of its own; loading is done in that process, one image after the other. Peak memory is "
        "the process's, Python and PyTorch included."
    ]
    return Table("speed", "Speed", FIGURES, [Section("Models", rows)], remarks, seeded=False)


def measure_apart(job: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own, and that process's peak memory in MB."""
    try:
        finished = run_module("experiments.speed", job)
    except ProcessFailed as error:
        raise Unavailable(str(error)) from None
    return {**finished.result, "memory": finished.memory.get("host"), "gpu_memory": finished.memory.get("gpu")}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time one part, a branch or the fusion, on the job's images: seconds an image, MB of checkpoints."""
    folder, name = Path(job["folder"]), job["part"]
    paths = {branch: path for branch, path in checkpoint_paths(folder).items() if name in (branch, USAD.name)}
    if name == USAD.name:
        model = USAD.load(folder, job["device"], job["precision"], job["weights"], **job["fusion"])
    else:
        ((_, path),) = paths.items()
        model = BRANCHES[name].load(path, job["weights"].get(name), job["device"], job["precision"])
    decoding = Decoding(**job.get("decoding", {}))
    samples = [Sample(Path(path), path, decoding=decoding) for path in job["images"]]
    dataset = ImageDataset(samples, model.image_size, "bicubic")
    loader = ImageLoader(dataset, job["batch_size"], 0, "")
    model.predict_parts(next(iter(loader))["image"].to(model.device))
    for watch in model.stopwatches().values():
        watch.seconds.clear()
    loading, start = Stopwatch(), time.perf_counter()
    for batch in timed(loader, loading):
        for part in model.predict_parts(batch["image"].to(model.device)).values():
            part.scores.cpu(), part.maps.cpu()
    total, stages = time.perf_counter() - start, stage_seconds(model)
    return {
        "images_per_second": len(samples) / total,
        "load": loading.seconds["load"] / len(samples),
        "extract": stages["extract"] / len(samples),
        "score": stages["score"] / len(samples),
        "checkpoint": sum(path.stat().st_size for path in paths.values()) / 1e6,
    }


def machine(device: str) -> str:
    """What timings depend on, for people."""
    return f"{environment(device)['device']}, threads: {torch.get_num_threads()}, PyTorch {torch.__version__}"


if __name__ == "__main__":
    answer(measure)
