"""From the checkpoints of a category to one ONNX file that has proved itself: the work of export_onnx.py."""

import argparse
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
from models.exported.export import halve_weights, write_graph
from models.exported.model import OnnxModel, open_session
from models.exported.proof import Proof, Tolerance, prove, settle_thresholds
from models.fusion.checkpoints import bit_depth_of, checkpoint_digests
from models.fusion.usad import USAD
from models.networks.weights import licence
from training.options import weights_by_branch
from training.training import held_out_samples
from utils.errors import InputError
from utils.files import PROGRAM, atomic_write, check_writable
from utils.locks import file_lock
from utils.packages import installed_version

FRAMES = 64  # of the proof
TOLERANCES = {
    "fp32": Tolerance(score=1e-4, map=1e-3, mean=1e-3),
    "fp16": Tolerance(score=2e-2, map=1.0, mean=1e-2),  # a patch near MACLU's threshold may fall to its other side
}


def export(args: argparse.Namespace) -> None:
    """Export the category's fusion, if it agrees with PyTorch on its own frames; `args` are export_onnx.py's flags."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if installed_version(name) is None]
    if missing:
        raise InputError(f"the export needs {', '.join(missing)}; pip install -r {EXPORT}")
    import onnx

    check_replaceable(args.out)
    checkpoints = args.models_dir / args.category
    decoding = Decoding(args.max_megapixels, bit_depth_of(checkpoints))  # raises if a checkpoint is missing
    category = Category(args.data_root, args.category, decoding)
    load = partial(USAD.load, checkpoints, "cpu", "fp32", weights_by_branch(args))
    with file_lock(args.out), atomic_write(args.out) as graph:
        usad = load()
        samples, held = normal_samples(category, usad)
        write_graph(load, graph)
        if args.precision == "fp16":
            halve_weights(graph)
        description = describe(usad, args.category, args.precision, checkpoint_digests(checkpoints))
        model = OnnxModel(open_session(graph), description)
        tolerance = TOLERANCES[args.precision]
        proof = prove(usad, model, samples[:FRAMES], tolerance)
        settle_thresholds(usad, model, proof, tolerance.score)
        point = model.operating_point
        description |= {"operating_point": point and dataclasses.asdict(point), "proof": proof.figures()}
        content = onnx.load(graph)
        onnx.helper.set_model_props(content, {FORMAT: json.dumps(description, ensure_ascii=False)})
        onnx.save(content, graph)
        model = None  # Windows replaces no open file
    summarize(args.out, proof, min(held, len(proof)))


def check_replaceable(path: Path) -> None:
    """Raise InputError if `path` is no name for our file, or holds a file that is not an exported model."""
    import onnx
    from google.protobuf.message import DecodeError

    if path.suffix.lower() != ".onnx":
        raise InputError(f"--out {path}: the name must end in .onnx")
    check_writable(path.parent)
    if not path.exists():
        return
    try:
        known = {entry.key for entry in onnx.load(path, load_external_data=False).metadata_props}
    except (DecodeError, OSError, ValueError):
        known = set()
    if FORMAT not in known:
        raise InputError(f"--out {path} exists and is not an exported model; move it away or choose another name")


def normal_samples(category: Category, usad: USAD) -> tuple[list[Sample], int]:
    """The training images, first those held out, as far as they can be told, and how many these are."""
    try:
        held = held_out_samples(category, usad.branches)
    except InputError:  # none were held out, or the files are no longer those of the training
        held = []
    names = {sample.name for sample in held}
    return held + [sample for sample in category.train_samples() if sample.name not in names], len(held)


def describe(usad: USAD, category: str, precision: str, digests: dict[str, str]) -> dict[str, Any]:
    """The file's metadata, as plain JSON values."""
    point = usad.operating_point
    return {
        "program": PROGRAM,
        "category": category,
        "image_size": usad.image_size,
        "preprocessing": "RGB; outside the region of interest the mean colour of the inside; stretched to the square, "
        "bicubic, antialiased (Pillow); divided by 255",
        "roi": usad.roi and usad.roi.to_text(),
        "bit_depth": usad.bit_depth,
        "fusion": usad.settings(),
        "operating_point": point and dataclasses.asdict(point),
        "precision": precision,
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


def summarize(out: Path, proof: Proof, held: int) -> None:
    """Print size, agreement and speed."""
    kinds = {"held-out": held, "training": len(proof) - held}
    frames = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    few = f" (fewer than {FRAMES}: there are no more)" if len(proof) < FRAMES else ""
    worst = proof.worst
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    print(
        f"agrees with PyTorch on {frames} frames{few}: scores to {worst.score:.1e}, maps to {worst.map:.1e} of their "
        f"range, {worst.mean:.1e} on average"
    )
    torchs, ours = (1000 * np.median(seconds) for seconds in zip(*(frame.seconds for frame in proof), strict=True))
    print(f"{ours:.0f} ms a frame by onnxruntime, {torchs:.0f} ms by PyTorch, on this CPU")
