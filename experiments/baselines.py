"""The comparison: USAD and its PatchCore beside anomalib's models on the same images, and the paper's figures."""

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from datasets.mvtec import split_training
from experiments import BASELINES
from experiments.fusions import DEFINED, FIGURES, Fusion, cell
from experiments.measurements import Measurements
from experiments.table import Cell, Row, Section, Table, Unavailable
from models import PatchCore
from models.branches import weights_flag
from models.branches.part import Part
from models.networks import libraries
from models.networks.spec import BackboneSpec
from utils.errors import InputError
from utils.processes import ROOT, run_module

ENVIRONMENT = Path(".venv-baselines")
INSTALL = f"python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install -r requirements-baselines.txt"
NO_ANOMALIB = f"not run, there is no anomalib: {INSTALL}, or --baselines-python PATH"
SHARING = ("padim", "patchcore")  # take network, weights, input size and images of our PatchCore
REPORTED = {"image_auroc": 0.973, "pixel_auroc": 0.958, "pro_as_published": 0.811}  # arXiv 2602.07694, on CoalAD


class Baselines(NamedTuple):
    """How anomalib is run: interpreter, version of its anomalib (None: it has none), models."""

    python: Path
    version: str | None
    names: list[str]


def find_baselines(python: Path | None, names: list[str]) -> Baselines:
    """Look for anomalib; raises InputError if an interpreter that was asked for does not have it."""
    folder = "Scripts/python.exe" if (ROOT / ENVIRONMENT / "Scripts").is_dir() else "bin/python"
    path = (python or ROOT / ENVIRONMENT / folder).absolute()
    version = None
    if path.exists():
        command = [path, "-c", "import importlib.metadata as m; print(m.version('anomalib'))"]
        asked = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        version = asked.stdout.strip() if asked.returncode == 0 else None
    if python and version is None:
        raise InputError(f"--baselines-python {python} is no Python that has anomalib; make one: {INSTALL}")
    return Baselines(path, version, names)


def comparison(measurements: Measurements, fusions: list[Fusion], baselines: Baselines) -> Table:
    """USAD, its PatchCore alone, the paper's figures if they are about this category, and the baselines."""
    networks = [variant.network for variant in fusions[0].variants.values()]
    kinds = {"random": "untrained", "file": "weights from a file"}
    words = [f"{net.name} ({kinds.get(net.weights, net.weights)}), {net.image_size} px" for net in networks]
    alone = [fusion.only(PatchCore.name) for fusion in fusions]
    rows = [
        Row("USAD", [cell(measurements, fusion) for fusion in fusions], "; ".join(words)),
        Row("its PatchCore alone", [cell(measurements, fusion) for fusion in alone]),
    ]
    if measurements.category.name == "coal_ad":
        rows.append(Row("USAD, as reported", [Cell(REPORTED, lambda: REPORTED)], "arXiv 2602.07694"))
    for name in baselines.names:
        cells = [_cell(name, baselines, measurements, fusion) for fusion in fusions]
        rows.append(Row(f"{BASELINES[name]} (anomalib)", cells))
    remarks = [
        f"All maps are evaluated at {fusions[0].size} x {fusions[0].size} pixels by the same code. anomalib's PaDiM "
        "and PatchCore have network, weights, input size, images, coreset ratio and neighbours of USAD's PatchCore "
        "(except the bundled network); other models have their own. anomalib's post-processing, which rescales and "
        "clamps, is left out.",
        DEFINED,
    ]
    return Table("comparison", FIGURES, [Section("Methods", "method", rows)], remarks)


def _cell(name: str, baselines: Baselines, measurements: Measurements, fusion: Fusion) -> Cell:
    """The figures of one baseline, fitted on the same images as USAD."""
    pc, run = fusion.variants[PatchCore.name], measurements.run
    split = pc.split if name in SHARING else dataclasses.replace(pc.split, train_ratio=1.0)
    network = pc.network if name in SHARING and pc.network.weights != "demo" else None
    work = {"model": name, "seed": pc.split.seed}
    if name == "patchcore":
        work |= {"coreset_ratio": pc.settings["coreset_ratio"], "neighbors": pc.settings["neighbors"]}
    needs = {
        **work,
        "anomalib": baselines.version,
        "network": network and [network.name, network.image_size, network.fingerprint],
        "training": [measurements.training_digest if baselines.version else None, dataclasses.asdict(split)],
        "images": measurements.images_digest,
        "decoding": dataclasses.asdict(measurements.category.decoding),
        "roi": pc.roi and pc.roi.to_text(),
        "precision": run.precision,
        "device": torch.device(run.device).type,
        "size": fusion.size,
    }

    def compute() -> dict[str, Any]:
        if baselines.version is None:
            raise Unavailable(NO_ANOMALIB)
        samples = measurements.category.train_samples()
        training, _ = split_training(samples, split.train_ratio, split.holdout_ratio, split.seed)
        measurements.folder.mkdir(parents=True, exist_ok=True)
        # Raw maps are as large as the images: they lie beside the measurements, and are gone once evaluated.
        with tempfile.TemporaryDirectory(prefix=".baseline_", dir=measurements.folder) as folder:
            out = Path(folder).absolute()
            job = {
                **work,
                "out": str(out),
                "network": network and shared_network(network, measurements.weights.get(PatchCore.name), out),
                "train": [str(item.path.absolute()) for item in training],
                "test": [str(item.path.absolute()) for item in measurements.samples],
                "run": dataclasses.asdict(run),
                "decoding": dataclasses.asdict(measurements.category.decoding),
            }
            setting = run_module("tools.anomalib_baseline", job, baselines.python).result
            figures = measurements.figures(raw_results(out, run.batch_size, fusion.size), pc.roi)
        return {**figures, "note": f"{setting}, anomalib {baselines.version}"}

    return Cell(needs, compute)


def shared_network(spec: BackboneSpec, weights: str | None, folder: Path) -> dict[str, Any]:
    """The network of our PatchCore for anomalib; its weights, or those that are now in `weights`, go to `folder`."""
    spec = spec.with_weights(weights) if weights else spec
    net = libraries.cnn(spec.name, (8, 16), spec.image_size)
    libraries.load_weights(net, spec, weights_flag(PatchCore.name))
    tensors = {name: value.contiguous() for name, value in net.net.state_dict().items()}
    save_file(tensors, folder / "network.safetensors")
    return {"name": spec.name, "image_size": spec.image_size, "weights": str(folder / "network.safetensors")}


def raw_results(folder: Path, batch_size: int, size: int) -> Iterator[Part]:
    """A baseline's raw scores and maps in batches, maps resized to [B, size, size]."""
    scores, maps = np.load(folder / "scores.npy"), np.load(folder / "maps.npy", mmap_mode="r")
    if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
        raise Unavailable("it gives a score or map that is not finite")
    for start in range(0, len(scores), batch_size):
        rows = slice(start, start + batch_size)
        yield Part(torch.from_numpy(scores[rows]), torch.from_numpy(np.array(maps[rows]))).resized(size)
