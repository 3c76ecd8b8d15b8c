"""PatchCore beside anomalib's: fit on 40 images and test, each in a process of its own, imports not counted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import SEED, Bench, Row
from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Category, Sample
from models.branches.patchcore import PatchCore
from models.networks.backbones import BackboneSpec, build_backbone
from utils.processes import answer, run_module


def patchcore(bench: Bench, images: int) -> Iterator[Row]:
    """Tested on `images` of the category's test images, or drawn ones."""
    folder = bench.category or bench.drawn_category(f"drawn_{images}", 64 if bench.quick else 400, images)
    category = Category(folder.parent, folder.name)
    network, size = bench.network(PatchCore)
    job = {
        "model": "patchcore",
        "settings": {"backbone": network, "coreset_sampling_ratio": 0.01, "num_neighbors": 3},
        "weights": ["random"],
        "image_size": size,
        "seed": SEED,
        "train": [str(sample.path) for sample in category.train_samples()[:40]],
        "test": [str(sample.path) for sample in category.test_samples()[:images]],
        "batch_size": bench.batch_size,
        "workers": 1,
        "device": bench.device,
    }
    threads = torch.get_num_threads()
    ours = run_module("benchmarks.patchcore", job, threads=threads)
    took, theirs, remark = ours.result["fit"] + ours.result["test"], None, "anomalib: not run, give --anomalib-python"
    if bench.anomalib_python:
        with tempfile.TemporaryDirectory() as out:
            found = run_module("tools.anomalib_baseline", {**job, "out": out}, bench.anomalib_python, threads)
        theirs = found.result["fit"] + found.result["test"]
        remark = f"anomalib; banks of {ours.result['bank']} and {found.result['bank']} entries; "
        remark += f"memory grew by {ours.memory['grown']:.0f} MB against {found.memory['grown']:.0f} MB; "
        remark += f"processor time {ours.result['cpu']:.1f} s against {found.result['cpu']:.1f} s"
    yield Row("PatchCore, fit and test", f"{images} test images", took, theirs, remark)


def fit_and_test(job: dict[str, Any]) -> dict[str, float]:
    """What tools/anomalib_baseline.py says of the same job: seconds, processor time, the bank's size."""
    import sklearn.random_projection  # noqa: F401  imports are not counted

    start, processor = time.perf_counter(), time.process_time()
    network, ratio, neighbors = job["settings"].values()
    spec = BackboneSpec("maps", network, job["image_size"], weights="random", seed=job["seed"])
    branch = PatchCore(build_backbone(spec, job["device"], precision="fp32"), ratio, neighbors)
    branch.fit(loader(job["train"], job, "bilinear"))
    fitted = time.perf_counter()
    for batch in loader(job["test"], job, "bicubic"):
        scores, maps, *_ = branch.predict(batch["image"].to(branch.device))
        scores.tolist(), maps.cpu()
    end, processor = time.perf_counter(), time.process_time() - processor
    return {"fit": fitted - start, "test": end - fitted, "cpu": processor, "bank": len(branch.memory_bank.rows)}


def loader(paths: list[str], job: dict[str, Any], resampling: str) -> ImageLoader:
    dataset = ImageDataset([Sample(Path(path), path) for path in paths], job["image_size"], resampling)
    return ImageLoader(dataset, job["batch_size"], job["workers"], "")


if __name__ == "__main__":
    answer(fit_and_test)
