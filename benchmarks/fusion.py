"""test_fusion.py --no-images from start to end, beside the published loop from start to end; untrained networks."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Row
from benchmarks.settings import SEED, Settings
from models import MACLU, MA2Patch, PatchCore
from utils.processes import run_python

SCRIPTS = {MACLU: ["train_ma_clu.py"], MA2Patch: ["train_ma2patch.py"], PatchCore: ["train_pc.py", "--train-ratio", 1]}


def fusion(settings: Settings, images: int) -> Iterator[Row]:
    """On the category's test images, or on `images` drawn ones."""
    category, threads = settings.category or draw_category(settings, images), torch.get_num_threads()
    models, results = settings.work / "models", settings.work / "result"
    common = ["--data-root", category.parent, "--category", category.name, "--models-dir", models]
    common += ["--results-dir", results, "--device", settings.device, "--precision", "fp32"]
    for branch, script in SCRIPTS.items():
        if not (models / category.name / f"{branch.name}.safetensors").exists():
            name, size = settings.network(branch)
            network = ["--backbone", name, "--image-size", size, "--weights", "random", "--seed", SEED]
            run_python([*script, *common, *network, "--no-eval"], threads=threads)
    plain_file = settings.work / "plain.json"
    rounds = []
    for _ in range(1 if settings.quick else 2):  # the first round warms the file cache; the better one counts
        ours = run_python(["test_fusion.py", *common, "--no-images"], threads=threads)
        plain = run_python(
            ["benchmarks/plain_fusion.py", models / category.name, category, plain_file], threads=threads
        )
        rounds.append((ours, plain))
    ours, plain = (min(side) for side in zip(*rounds, strict=True))
    folder = results / category.name / "fusion"
    expected, found, config = map(read_json, (plain_file, folder / "metrics.json", folder / "config.json"))
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        scores = np.array([float(row["score"]) for row in csv.DictReader(file)])
    near = np.abs(scores / np.array(expected["scores"]) - 1).max()
    figures = [f"{name} {found[name]} and {value}" for name, value in expected["metrics"].items()]
    yield Row(
        "test_fusion.py, whole process, fp32",
        len(scores),
        "images",
        ours.seconds,
        plain.seconds,
        "published loop, whole process",
        f"scores within {near:.1e}; {', '.join(figures)}",
        {
            "cpu_seconds": ours.cpu_seconds,
            "reference_cpu_seconds": plain.cpu_seconds,
            "seconds": config["seconds"],
            "peak_memory_mb": config["peak_memory_mb"],
        },
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def draw_category(settings: Settings, images: int) -> Path:
    """40 training and `images` test images of drawn scenes, half of these with a foreign object."""
    root, name = settings.work / "data", f"drawn_{images}"
    counts = ["--train", 40, "--good", images // 2, "--anomalous", images - images // 2]
    size = 64 if settings.quick else 400
    run_python(["make_demo_data.py", "--data-root", root, "--category", name, "--size", size, *counts])
    return root / name
