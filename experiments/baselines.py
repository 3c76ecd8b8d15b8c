"""The comparison: USAD beside anomalib's models on the same images, and beside the paper's figures."""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from datasets.mvtec import Category, split_training
from experiments import BASELINES
from experiments.cells import Cell, CellStore, Row, Section, Table, Unavailable
from experiments.fusions import DEFINED, FIGURES, Bench, Fusion
from models import PatchCore
from models.branches.part import Part
from utils.errors import InputError
from utils.files import sha256_of_file
from utils.processes import ROOT, ProcessFailed, run_module

ENVIRONMENT = Path(".venv-baselines")
INSTALL = f"python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install -r requirements-baselines.txt"
NO_ANOMALIB = f"not run, there is no anomalib: {INSTALL}, or --baselines-python PATH"
NOT_PRETRAINED = "not run: it takes the pretrained weights that anomalib downloads, --baselines-weights pretrained"
UNTRAINED = ("padim", "patchcore")  # the models that run without pretrained weights
KINDS = ("pretrained", "random")  # of weights, beside files
REPORTED = {"image_auroc": 0.973, "pixel_auroc": 0.958, "pro_as_published": 0.811}  # arXiv 2602.07694, on CoalAD
REPORTED_ON = "coal_ad"


class Baselines(NamedTuple):
    """How anomalib is run: interpreter, version of its anomalib (None: it has none), models, weights."""

    python: Path
    version: str | None
    names: list[str]
    weights: list[str]  # ["pretrained"], ["random"], or files


def find_baselines(python: Path | None, names: list[str], weights: list[str]) -> Baselines:
    """Look for anomalib; raises InputError if an interpreter that was asked for does not have it."""
    folder = "Scripts/python.exe" if (ROOT / ENVIRONMENT / "Scripts").is_dir() else "bin/python"
    path = python or ROOT / ENVIRONMENT / folder
    for file in weights:
        if not (weights == [file] and file in KINDS) and not Path(file).is_file():
            raise InputError(f"--baselines-weights {file}: no such file; give pretrained, random, or files of weights")
    version = None
    if path.exists():
        command = [path, "-c", "import importlib.metadata as m; print(m.version('anomalib'))"]
        asked = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        version = asked.stdout.strip() if asked.returncode == 0 else None
    if python and version is None:
        raise InputError(f"--baselines-python {python} is no Python that has anomalib; make one: {INSTALL}")
    return Baselines(path.absolute(), version, names, weights)


def comparison(bench: Bench, fusions: list[Fusion], category: Category, baselines: Baselines) -> Table:
    """USAD, the paper's figures if they are about this category, and the baselines."""
    broken: dict[str, str] = {}
    rows = [Row({"method": "USAD"}, [(bench.cell(fusion),) for fusion in fusions], note=_networks(fusions[0]))]
    if category.name == REPORTED_ON:
        rows.append(Row({"method": "USAD, as reported"}, figures=REPORTED, note="arXiv 2602.07694"))
    if baselines.version is None:
        broken = dict.fromkeys(baselines.names, NO_ANOMALIB)
    elif baselines.weights != ["pretrained"]:
        broken = {name: NOT_PRETRAINED for name in baselines.names if name not in UNTRAINED}
    for name in baselines.names:
        cells = [(_cell(name, baselines, bench, fusion, category, broken),) for fusion in fusions]
        rows.append(Row({"method": f"{BASELINES[name]} (anomalib)"}, cells))
    remarks = [
        f"All methods see the same training and test images, and all maps are evaluated at {fusions[0].size} x "
        f"{fusions[0].size} pixels by the same code. anomalib's own preprocessing and settings are kept; its "
        "post-processing, which rescales and clamps, is left out.",
        DEFINED,
    ]
    return Table("comparison", "Comparison", FIGURES, [Section("Methods", rows)], remarks)


def add_difference(table: Table, store: CellStore) -> None:
    """Put the difference to the reported figures below them, if the table has them."""
    rows = table.sections[0].rows
    if rows[1:] and rows[1].figures is REPORTED:
        ours = store.row(rows[0])["figures"]
        means = {key: ours[key]["mean"] for key in REPORTED if ours.get(key, {}).get("mean") is not None}
        difference = {key: mean - REPORTED[key] for key, mean in means.items()}
        rows.insert(2, Row({"method": "difference to the report"}, figures=difference))


def _networks(fusion: Fusion) -> str:
    """The networks in words, and whether they are untrained."""
    networks = [variant.network for variant in fusion.variants.values()]
    kinds = {"random": "untrained", "file": "weights from a file"}
    words = [f"{net.name} ({kinds.get(net.weights, net.weights)}), {net.image_size} px" for net in networks]
    return "; ".join(words)


def _cell(
    name: str, baselines: Baselines, bench: Bench, fusion: Fusion, category: Category, broken: dict[str, str]
) -> Cell:
    """The figures of one baseline, fitted on the same images as USAD; `broken` collects why some cannot run."""
    pc, run = fusion.variants[PatchCore.name], bench.measurements.run
    settings = {}
    if name == "patchcore":  # its default, a tenth, takes hours on large data; so both PatchCores keep the same share
        settings["coreset_sampling_ratio"] = pc.settings["coreset_ratio"]
    work = {"model": name, "seed": pc.seed, "settings": settings}
    needs = {
        **work,
        "anomalib": baselines.version,
        "weights": [file if file in KINDS else sha256_of_file(file) for file in baselines.weights],
        "training": [bench.measurements.training_digest() if baselines.version else None, pc.holdout_ratio],
        "images": bench.images.digest,
        "size": fusion.size,
    }

    def compute() -> dict[str, Any]:
        if name in broken:
            raise Unavailable(broken[name])
        training, _ = split_training(category.train_samples(), 1.0, pc.holdout_ratio, pc.seed)
        job = {
            **work,
            "weights": [file if file in KINDS else str(Path(file).absolute()) for file in baselines.weights],
            "train": [str(item.path.absolute()) for item in training],
            "test": [str(item.path.absolute()) for item in bench.images.samples],
            "device": run.device,
            "batch_size": run.batch_size,
            "workers": run.workers,
            "decoding": dataclasses.asdict(category.decoding),
        }
        bench.measurements.folder.mkdir(parents=True, exist_ok=True)
        # Raw maps are as large as the images: they lie beside the measurements, and are gone once evaluated.
        with tempfile.TemporaryDirectory(prefix=".baseline_", dir=bench.measurements.folder) as folder:
            try:
                setting = run_baseline(baselines.python, job, Path(folder))
            except Unavailable as reason:
                broken[name] = str(reason)  # the other seeds need not wait for the same download to fail
                raise
            figures = bench.images.figures(raw_results(Path(folder), bench.batch_size, fusion.size), pc.roi)
        said = [f"coreset ratio {ratio:g}" for ratio in settings.values()]
        return {**figures, "note": ", ".join([setting, *said, f"anomalib {baselines.version}"])}

    return Cell(needs, compute)


def run_baseline(python: Path, job: dict[str, Any], folder: Path) -> str:
    """Run one model in a process of its own, which leaves scores.npy and maps.npy in `folder`.

    Returns its settings in words; raises Unavailable with the reason if it fails.
    """
    try:
        job = {**job, "out": str(folder.absolute())}
        return run_module("tools.anomalib_baseline", job, python).result["setting"]
    except ProcessFailed as error:
        raise Unavailable(str(error)) from None


def raw_results(folder: Path, batch_size: int, size: int) -> Iterator[Part]:
    """A baseline's raw scores and maps in batches, maps resized to [B, size, size]."""
    scores, maps = np.load(folder / "scores.npy"), np.load(folder / "maps.npy", mmap_mode="r")
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise Unavailable("it gives a score or map that is not finite")
    for start in range(0, len(scores), batch_size):
        rows = slice(start, start + batch_size)
        yield Part(torch.from_numpy(scores[rows]), torch.from_numpy(np.array(maps[rows]))).resized(size)
