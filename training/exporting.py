"""From the checkpoints of a category to one ONNX file that has proved itself: the work of export_onnx.py."""

from __future__ import annotations

import dataclasses
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datasets.images import Decoding
from datasets.mvtec import Category, Sample
from models.exported import EXPORT, FORMAT
from models.exported.export import write_graph
from models.exported.model import OnnxModel, as_input, open_session
from models.exported.precision import halve_weights, quantize_networks
from models.exported.proof import Proof, Tolerance, image_auroc, prove, settle_thresholds
from models.fusion.checkpoints import checkpoint_digests, checkpoint_paths
from models.fusion.operating_point import find_operating_point
from models.fusion.prediction import as_picture
from models.fusion.usad import USAD
from models.networks.weights import licence
from training.settings import ExportSettings
from training.training import held_out_samples
from utils.command_line import warn
from utils.errors import InputError
from utils.files import atomic_write, check_writable
from utils.locks import file_lock
from utils.ownership import PROGRAM
from utils.packages import installed_version

FRAMES = 64  # of the proof
CALIBRATION = 32  # frames that the scales of 8-bit integers come from
TOLERANCES = {
    "fp32": Tolerance(score=1e-4, map=1e-3),
    "fp16": Tolerance(score=1e-2, map=5e-2),
    "int8": Tolerance(score=0.2, map=0.5),
}
LOSS = 0.005  # of the image AUROC, by integers


def export(settings: ExportSettings) -> None:
    """Export the category's fusion to `settings.out`, if it agrees with PyTorch on its own frames."""
    check_packages_of_export()
    check_replaceable(settings.out)
    checkpoints = settings.models_dir / settings.category
    checkpoint_paths(checkpoints)  # raises if one is missing
    category = Category(settings.data_root, settings.category, Decoding(settings.max_megapixels))
    load = partial(USAD.load, checkpoints, "cpu", "fp32", settings.weights)
    with file_lock(settings.out), atomic_write(settings.out) as graph:
        usad = load()
        category.decoding = dataclasses.replace(category.decoding, bit_depth=usad.bit_depth)
        held, others = normal_samples(category, usad)
        write_graph(load, graph)
        if settings.precision == "fp16":
            halve_weights(graph)
        elif settings.precision == "int8":
            pictures = (as_picture(sample.read(), usad.roi).image for sample in (others or held)[:CALIBRATION])
            quantize_networks(graph, (as_input([picture], usad.image_size) for picture in pictures))
        description = describe(usad, settings, checkpoints)
        model = OnnxModel(open_session(graph), description)
        # Integers move the scores, so that thresholds are found again: on all held-out frames.
        samples = held if settings.precision == "int8" and held else (held + others)[:FRAMES]
        tolerance = TOLERANCES[settings.precision]
        proof = prove(usad, model, samples, tolerance)
        if settings.precision == "int8":
            find_thresholds_again(model, proof, bool(held))
            description["image_auroc"] = compare_auroc(usad, model, category)
        else:
            settle_thresholds(usad, model, proof.pairs, tolerance.score)
        point = model.operating_point
        description |= {"operating_point": point and dataclasses.asdict(point), "proof": proof.figures()}
        add_metadata(graph, description)
        model = None  # Windows replaces no open file
    summarize(settings.out, proof, min(len(held), proof.frames))


def check_packages_of_export() -> None:
    """Raise InputError if a package is missing that only the export needs."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if installed_version(name) is None]
    if missing:
        raise InputError(f"the export needs {', '.join(missing)}; pip install -r {EXPORT}")


def check_replaceable(path: Path) -> None:
    """Raise InputError if `path` is no name for our file, or holds a file that is not an exported model."""
    if path.suffix.lower() != ".onnx":
        raise InputError(f"--out {path}: the name must end in .onnx")
    check_writable(path.parent)
    if path.exists() and not is_ours(path):
        raise InputError(f"--out {path} exists and is not an exported model; move it away or choose another name")


def is_ours(path: Path) -> bool:
    """Whether the file is an ONNX file with our metadata."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return any(entry.key == FORMAT for entry in onnx.load(path, load_external_data=False).metadata_props)
    except (DecodeError, OSError, ValueError):
        return False


def normal_samples(category: Category, usad: USAD) -> tuple[list[Sample], list[Sample]]:
    """The training images: those held out, as far as they can be told, and the others."""
    try:
        held = held_out_samples(category, usad.branches)
    except InputError:  # none were held out, or the files are no longer those of the training
        held = []
    names = {sample.name for sample in held}
    return held, [sample for sample in category.train_samples() if sample.name not in names]


def find_thresholds_again(model: OnnxModel, proof: Proof, held_out: bool) -> None:
    """Give the model thresholds for the same rate of false alarms, from its own scores of the held-out frames.

    Raises InputError if it has thresholds, but there are no such frames.
    """
    point = model.operating_point
    if point is None:
        return
    if not held_out:
        raise InputError("--precision int8 finds the thresholds again on held-out frames, and --data-root has none")
    scores, peaks = np.array([[found.score, found.peak] for _, _, found in proof.pairs]).T
    rate, fusion, digests = point.false_alarm_rate, point.fusion, point.checkpoints
    model.operating_point = find_operating_point(scores, peaks.astype(np.float32), rate, fusion, digests)


def compare_auroc(usad: USAD, model: OnnxModel, category: Category) -> dict[str, float] | None:
    """The image AUROC of both on the test images; None if there is none. Raises InputError if too much is lost."""
    try:
        samples = category.test_samples()
    except InputError:
        samples = []
    original, ours = (image_auroc(one, samples) if samples else None for one in (usad, model))
    if original is None:
        warn("no test images, normal and anomalous: what integers cost cannot be judged")
        return None
    print(f"image AUROC on {len(samples)} test images: {ours:.4f}, by PyTorch {original:.4f}")
    if ours < original - LOSS:
        raise InputError(f"--precision int8 loses more than {LOSS:g} of the image AUROC; nothing was written")
    return {"pytorch": original, "int8": ours}


def describe(usad: USAD, settings: ExportSettings, checkpoints: Path) -> dict[str, Any]:
    """The file's metadata, as plain JSON values."""
    point = usad.operating_point
    digests = checkpoint_digests(checkpoints)
    return {
        "program": PROGRAM,
        "category": settings.category,
        "image_size": usad.image_size,
        "preprocessing": "RGB; outside the region of interest the mean colour of the inside; stretched to the square, "
        "bicubic, antialiased (Pillow); divided by 255",
        "roi": usad.roi and usad.roi.to_text(),
        "bit_depth": usad.bit_depth,
        "fusion": usad.settings(),
        "operating_point": point and dataclasses.asdict(point),
        "precision": settings.precision,
        "branches": {
            branch.name: {
                "checkpoint": digests[f"{branch.name}.safetensors"],
                "network": branch.backbone.spec.to_dict(),
                "licence": licence(branch.backbone.spec),
                "settings": branch.settings(),
            }
            for branch in usad.branches
        },
        "versions": {name: installed_version(name) for name in ("torch", "onnx", "onnxscript")}
        | {"python": platform.python_version()},
    }


def add_metadata(path: Path, description: dict[str, Any]) -> None:
    """Store the metadata in the file."""
    import onnx

    content = onnx.load(path)
    onnx.helper.set_model_props(content, {FORMAT: json.dumps(description, ensure_ascii=False)})
    onnx.save(content, path)


def summarize(out: Path, proof: Proof, held: int) -> None:
    """Print size, agreement and speed."""
    kinds = {"held-out": held, "training": proof.frames - held}
    frames = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    few = f" (fewer than {FRAMES}: there are no more)" if proof.frames < FRAMES else ""
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    print(f"agrees with PyTorch on {frames} frames{few}: scores to {proof.score:.1e}, maps to {proof.map:.1e}")
    if timed := proof.frames - 1:
        ours, torchs = (1000 * seconds / timed for seconds in (proof.seconds, proof.seconds_of_original))
        print(f"{ours:.0f} ms a frame by onnxruntime, {torchs:.0f} ms by PyTorch, on this CPU")
