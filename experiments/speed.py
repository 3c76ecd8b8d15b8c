"""How fast, and in how much memory: each branch and the fusion in a process of its own."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from datasets.images import Decoding
from datasets.mvtec import Sample
from evaluation.evaluate import predicted, stage_seconds
from experiments.fusions import Fusion
from experiments.measurements import Measurements
from experiments.table import Cell, Row, Section, Table
from models import BRANCHES, USAD
from models.fusion.checkpoints import checkpoint_digests, checkpoint_path
from training.settings import RunSettings
from training.training import evenly_spaced, test_loader
from utils.machine import environment
from utils.processes import answer, run_module
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


def speed(measurements: Measurements, fusion: Fusion, folder: Path) -> Table:
    """Each branch of the checkpoints in `folder`, and their fusion."""
    run, samples = measurements.run, evenly_spaced(measurements.samples, IMAGES)
    machine = f"{environment(run.device)['device']}, threads: {torch.get_num_threads()}, PyTorch {torch.__version__}"
    job = {
        "models": str(folder.absolute()),
        "images": [str(sample.path.absolute()) for sample in samples],
        "decoding": dataclasses.asdict(measurements.category.decoding),
        "run": dataclasses.asdict(run) | {"workers": 0},
        "weights": {name: file and str(Path(file).absolute()) for name, file in measurements.weights.items()},
        "fusion": fusion.settings,
    }
    needs = {**job, "checkpoints": checkpoint_digests(folder), "machine": machine}
    rows = [
        Row(name, [Cell({**needs, "part": name}, lambda name=name: measure_apart({**job, "part": name}))])
        for name in (*fusion.parts, USAD.name)
    ]
    remarks = [
        f"{machine}; batches of {run.batch_size}; {len(samples)} test images after a batch to warm up. Each row is a "
        "process of its own; loading is done in that process, one image after the other. Peak memory is the process's, "
        "Python and PyTorch included."
    ]
    return Table("speed", FIGURES, [Section("Models", "model", rows)], remarks, seeded=False)


def measure_apart(job: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own, and that process's peak memory in MB."""
    finished = run_module("experiments.speed", job)
    return {**finished.result, "memory": finished.memory.get("host"), "gpu_memory": finished.memory.get("gpu")}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time the job's part, a branch or the fusion, on its images: seconds an image, MB of checkpoints."""
    folder, run = Path(job["models"]), RunSettings(**job["run"])
    if job["part"] == USAD.name:
        model = USAD.load(folder, run.device, run.precision, job["weights"], **job["fusion"])
    else:
        path, weights = checkpoint_path(folder, job["part"]), job["weights"].get(job["part"])
        model = BRANCHES[job["part"]].load(path, weights, run.device, run.precision)
    files = [checkpoint_path(folder, branch.name) for branch in getattr(model, "branches", [model])]
    decoding = Decoding(**job["decoding"])
    samples = [Sample(Path(path), path, decoding=decoding) for path in job["images"]]
    loader = test_loader(run, samples, model, "speed")
    model.predict_parts(next(iter(loader))["image"].to(model.device))
    for watch in model.stopwatches().values():
        watch.seconds.clear()
    loading, start = Stopwatch(), time.perf_counter()
    for _ in predicted(model, loader, loading):
        pass
    total, stages = time.perf_counter() - start, stage_seconds(model) | loading.seconds
    return {
        "images_per_second": len(samples) / total,
        **{stage: stages[stage] / len(samples) for stage in ("load", "extract", "score")},
        "checkpoint": sum(file.stat().st_size for file in files) / 1e6,
    }


if __name__ == "__main__":
    answer(measure)
