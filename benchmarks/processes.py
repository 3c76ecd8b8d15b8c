"""Whole processes: the fusion test, PatchCore beside anomalib's, and a training's memory as images become more."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.measure import Row, apart
from benchmarks.settings import SEED, Noise, Settings
from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Category, Sample
from models.branches.branch import Branch
from models.branches.ma_clu import MACLU
from models.branches.patchcore import PatchCore
from models.networks.backbones import BackboneSpec, build_backbone
from scenes.scenes import draw_scene

ROOT = Path(__file__).resolve().parents[1]
TRAINED_ON = 40
FLAGS = {
    "train_ma_clu": ("ma_clu", []),
    "train_ma2patch": ("ma2patch", []),
    "train_pc": ("pc", ["--train-ratio", "1"]),
}


def fusion(settings: Settings, images: int) -> Iterator[Row]:
    """test_fusion.py --no-images, start to end, against the published loop, start to end; untrained networks."""
    category = a_category(settings, images)
    common = ["--data-root", category.parent, "--category", category.name, "--models-dir", settings.work / "models"]
    common += ["--results-dir", settings.work / "result", "--device", settings.device]
    for script, (branch, flags) in FLAGS.items():
        if not (settings.work / "models" / category.name / f"{branch}.safetensors").exists():
            name, size = settings.networks[branch]
            network = ["--backbone", name, "--image-size", size, "--weights", "random", "--seed", SEED]
            _run([ROOT / f"{script}.py", *common, *network, *flags, "--no-eval", "--precision", "fp32"])
    out = settings.work / "plain.json"
    models = settings.work / "models" / category.name
    plain_command = [ROOT / "benchmarks" / "plain_fusion.py", models, category, out]
    command = [ROOT / "test_fusion.py", *common, "--no-images", "--precision", "fp32"]
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
    for _ in range(1 if settings.quick else 2):  # the first round warms the file cache; the better one counts
        for side, words in (("ours", command), ("plain", plain_command)):
            times[side].append(_run(words))
    folder = settings.work / "result" / category.name / "fusion"
    plain = json.loads(out.read_text(encoding="utf-8"))
    metrics, config = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("metrics.json", "config.json")
    )
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        scores = np.array([float(row["score"]) for row in csv.DictReader(file)])
    near = np.abs(scores / np.array(plain["scores"]) - 1).max()
    figures = ", ".join(
        f"{name} {_figure(metrics[name])} and {_figure(value)}" for name, value in plain["metrics"].items()
    )
    yield Row(
        "test_fusion.py, whole process, fp32",
        len(scores),
        "images",
        min(times["ours"])[0],
        min(times["plain"])[0],
        "published loop, whole process",
        f"scores within {near:.1e}; {figures}",
        {
            "cpu_seconds": min(times["ours"])[1],
            "reference_cpu_seconds": min(times["plain"])[1],
            "seconds": config["seconds"],
            "peak_memory_mb": config["peak_memory_mb"],
        },
    )


def patchcore(settings: Settings, images: int) -> Iterator[Row]:
    """PatchCore fitted on 40 images and tested on `images`, in a process, imports not counted; anomalib's likewise."""
    folder = a_category(settings, images)
    category = Category(folder.parent, folder.name)
    name, size = settings.networks["pc"]
    job = {
        "train": [str(sample.path) for sample in category.train_samples()[:TRAINED_ON]],
        "test": [str(sample.path) for sample in category.test_samples()[:images]],
        "network": name,
        "image_size": size,
        "coreset_ratio": 0.01,
        "neighbors": 3,
        "seed": SEED,
        "batch_size": settings.batch_size,
        "workers": 1,
        "device": settings.device,
        "threads": torch.get_num_threads(),
    }
    _, memory, ours = apart(fit_and_test, job)
    theirs: dict[str, Any] = {}
    against = "anomalib's PatchCore"
    if settings.anomalib_python is None:
        against += ": not run, give --anomalib-python"
    else:
        files = settings.work / "job.json", settings.work / "anomalib.json"
        files[0].write_text(json.dumps(job), encoding="utf-8")
        _run([ROOT / "benchmarks" / "anomalib_patchcore.py", *files], settings.anomalib_python)
        theirs = json.loads(files[1].read_text(encoding="utf-8"))
    yield Row(
        "PatchCore, fit and test in one process",
        images,
        "test images",
        ours["fit"] + ours["test"],
        theirs["fit"] + theirs["test"] if theirs else None,
        against,
        (
            f"banks of {ours['bank']} and {theirs['bank']} entries; memory grew by {memory:.0f} MB and "
            f"{theirs['memory']:.0f} MB"
            if theirs
            else ""
        ),
        {
            **({"cpu_seconds": ours["cpu"], "reference_cpu_seconds": theirs["cpu"]} if theirs else {}),
            "ours": {**ours, "memory": memory},
            "anomalib": theirs,
        },
    )


def fit_and_test(job: dict[str, Any]) -> dict[str, float]:
    """Seconds of both, and the bank's size."""
    import sklearn.random_projection  # noqa: F401  imports are not counted

    start, processor = time.perf_counter(), time.process_time()
    spec = BackboneSpec("maps", job["network"], job["image_size"], weights="random", seed=job["seed"])
    branch = PatchCore(build_backbone(spec, job["device"], precision="fp32"), job["coreset_ratio"], job["neighbors"])
    branch.fit(_loader(job["train"], job, "bilinear"))
    fitted = time.perf_counter()
    for batch in _loader(job["test"], job, "bicubic"):
        scores, maps, *_ = branch.predict(batch["image"].to(branch.device))
        scores.tolist(), maps.cpu()
    end, processor = time.perf_counter(), time.process_time() - processor
    return {"fit": fitted - start, "test": end - fitted, "cpu": processor, "bank": len(branch.memory_bank.rows)}


def _loader(paths: list[str], job: dict[str, Any], resampling: str) -> ImageLoader:
    dataset = ImageDataset([Sample(Path(path), path) for path in paths], job["image_size"], resampling)
    return ImageLoader(dataset, job["batch_size"], job["workers"], "")


def memory(settings: Settings, images: int) -> Iterator[Row]:
    """By how much a fit on `images` raises peak memory, against a fit on as many as fill the patch budget."""
    budget = 0.001 if settings.quick else 0.05  # GB
    for branch, kind, name in ((MACLU, "tokens", "test_vit"), (PatchCore, "maps", "test_resnet")):
        backbone = build_backbone(BackboneSpec(kind, name, 64, weights="random", seed=SEED))
        at_budget = int(budget * 1e9 / (4 * backbone.grid[0] * backbone.grid[1] * backbone.dim))
        count = max(images, 4 * at_budget)
        _, full, _ = apart(fit_noise, branch, kind, name, budget, at_budget)
        took, grown, _ = apart(fit_noise, branch, kind, name, budget, count)
        agreement = f"{grown:.0f} MB against {full:.0f} MB: {grown / full:.2f} times"
        details = {"mb": grown, "mb_at_budget": full, "images_at_budget": at_budget, "budget_gb": budget}
        against = f"a fit on the {at_budget} images that fill the budget"
        yield Row(f"memory of {branch.name}'s fit", count, "images", took, None, against, agreement, details)


def fit_noise(branch_class: type[Branch], kind: str, name: str, budget: float, images: int) -> None:
    """Fit a small network's branch on noise that is made as it is read."""
    backbone = build_backbone(BackboneSpec(kind, name, 64, weights="random", seed=SEED))
    branch_class(backbone, patch_budget=budget).fit(Noise(images, 64))


def a_category(settings: Settings, images: int) -> Path:
    """A category of 40 training and `images` test images: taken evenly from the one given, or drawn."""
    folder = settings.work / "data" / f"{'drawn' if settings.category is None else settings.category.name}_{images}"
    if (folder / "done").exists():
        return folder
    if settings.category is None:
        _draw_category(folder, images, 64 if settings.quick else 400)
    else:
        source = Category(settings.category.parent, settings.category.name)
        for samples, count in ((source.train_samples(), TRAINED_ON), (source.test_samples(), images)):
            for sample in (samples[index * len(samples) // count] for index in range(count)):
                for path in (sample.path, *sample.masks):
                    target = folder / path.relative_to(settings.category)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
    (folder / "done").touch()
    return folder


def _draw_category(folder: Path, images: int, size: int) -> None:
    parts = [
        ("train/good", TRAINED_ON, None),
        ("test/good", images // 2, None),
        ("test/rope", images - images // 2, "rope"),
    ]
    for number, (part, count, kind) in enumerate(parts):
        for index in range(count):
            image, mask = draw_scene((SEED, number, index), size, kind)
            _write(folder / part / f"{index:03d}.png", image)
            if kind:
                _write(folder / "ground_truth" / kind / f"{index:03d}_mask.png", (mask > 0) * np.uint8(255))


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _run(words: list[Any], python: Path | str = sys.executable) -> tuple[float, float]:
    """Run a script with as many threads as this process: seconds of wall time and of all processors' time.

    The second hardly depends on what else the machine does, if the threads are one. Raises RuntimeError with the
    script's last line if it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    start = time.perf_counter(), _children_cpu()
    done = subprocess.run([python, *map(str, words)], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        raise RuntimeError(f"{words[0]} ended with code {done.returncode}: {last}")
    return time.perf_counter() - start[0], _children_cpu() - start[1]


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system
