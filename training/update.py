"""Checkpoints that take in new frames of train/good, and the former ones put back."""

import argparse
import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from datasets.mvtec import MIN_HELD, Category, Sample
from datasets.region import RegionOfInterest
from models.branches.branch import Branch, bit_depth_in, region_in, tiles_in, understood
from models.branches.frames import TrainingFrames, mark
from models.fusion.checkpoints import checkpoint_digests
from models.fusion.operating_point import FILE_NAME, OperatingPoint
from models.networks.spec import SOURCES
from training.options import RUN_FLAGS
from training.settings import SplitSettings
from utils.checkpoint import load_checkpoint, read_metadata
from utils.command_line import warn
from utils.errors import InputError
from utils.files import atomic_write, sha256_of_file
from utils.locks import file_lock


class Present(NamedTuple):
    """What an update takes over from the present checkpoint."""

    frames: TrainingFrames
    split: SplitSettings
    bit_depth: int
    precision: str
    images: int  # it was fitted on
    left_out: list[str]


class Portion(NamedTuple):
    """Frames that a checkpoint takes in."""

    fitted: list[Sample]
    held_out: list[Sample]  # all, those of before among them
    frames: TrainingFrames  # that it knows afterwards


def settings_in(metadata: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings under the names of the training flags, among others. Raises KeyError or TypeError."""
    network = metadata["backbone"]
    return {
        **metadata["training"],
        **network,
        "backbone": network["name"],
        "weights": network["file"] if network["weights"] == "file" else network["weights"],
        "position_size": network["position_size"] or network["image_size"],
        "bit_depth": bit_depth_in(metadata),
        "tiles": tiles_in(metadata),
        **metadata["settings"],
    }


def present_checkpoint(path: Path, args: argparse.Namespace, roi: RegionOfInterest | None) -> Present:
    """The checkpoint to be updated. Raises InputError if it cannot be, or a flag contradicts its settings."""
    tensors, metadata = load_checkpoint(path)
    frames = TrainingFrames.from_state(tensors)
    if not frames.known:
        raise InputError(
            f"{path} does not say which frames it was fitted on: an earlier version wrote it, or it was converted; "
            "train the branch again"
        )
    with understood(path, metadata, path.stem):
        stored, region, training = settings_in(metadata), region_in(metadata), metadata["training"]
        split = SplitSettings(float(training["train_ratio"]), float(training["holdout_ratio"]), int(training["seed"]))
        precision = metadata["backbone"]["precision"]
        settled = bit_depth_in(metadata), precision, int(training["images"]), list(training["left_out"])
    for name, value in vars(args).items():
        if name in RUN_FLAGS or value is None or stored.get(name) == value:
            continue
        moved = name == "weights" and not {value, stored[name]} & set(SOURCES)  # a file; its content is checked later
        if not moved and not (name == "roi" and roi == region):
            kept = stored.get(name)
            if name == "roi":
                kept = "another region of interest" if region else "no region of interest"
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {value}: {path} has {kept}, and an update keeps it; leave it out, or train again")
    if stored.get("category") != path.parent.name:
        warn(
            f"{path} is of category '{stored.get('category')}': frames of {path.parent.name} with names that it knows "
            "count as learned; if they are others, train anew"
        )
    return Present(frames, split, *settled)


def portion(category: Category, present: Present) -> Portion | None:
    """The frames that the checkpoint has not had, and its held-out ones; None if there is nothing to learn from.

    Chance decides on each frame by its name alone: branches that are updated more or less often hold out the same.
    Raises InputError if too few of the held-out frames are left.
    """
    frames, split, samples = present.frames, present.split, category.train_samples()
    new = [sample for sample in samples if mark(sample.name) not in frames.known]
    held_out = {sample for sample in new if _lot(f"holdout {split.seed}", sample) < split.holdout_ratio}
    fitted = [s for s in new if s not in held_out and _lot(f"fit {split.seed}", s) < split.train_ratio]
    if not fitted and not held_out:
        return None
    kept = [sample for sample in samples if sample in held_out or mark(sample.name) in frames.held_out]
    if gone := len(held_out) + len(frames.held_out) - len(kept):
        rest = f"{gone} of the {len(frames.held_out)} held-out images of {category.folder} are gone"
        if len(kept) < MIN_HELD:
            raise InputError(f"{rest}, and statistics need {MIN_HELD}; restore them, or train again")
        warn(f"{rest}; the statistics are of {len(kept)}")
    names = (sample.name for sample in new)
    known = TrainingFrames.named(names, (sample.name for sample in kept))
    return Portion(fitted, kept, TrainingFrames(frames.known | known.known, known.held_out))


def _lot(purpose: str, sample: Sample) -> float:
    """A number in [0, 1) drawn for the frame."""
    return mark(f"{purpose} {sample.name}") / 16**15


def replace(branch: Branch, path: Path) -> None:
    """Write the updated branch to `path`, and keep what was there for `roll_back`.

    The new checkpoint names the former one by its digest. So the former one can be put back at each moment: it is there
    before it is named, and the one before it goes last.
    """
    digest = sha256_of_file(path)
    former = _former(path, digest)
    with atomic_write(former) as temporary:
        shutil.copyfile(path, temporary)
    branch.training["former"] = digest
    branch.save(path)
    for other in path.parent.iterdir():
        if other != former and re.fullmatch(rf"\.?{path.stem}\.former-[0-9a-f]+.*{path.suffix}", other.name):
            other.unlink()
    print(f"{branch.training['category']}: kept the former checkpoint for --rollback, {former}")
    if (path.parent / FILE_NAME).exists():
        print(
            f"{path.parent / FILE_NAME} has thresholds for the former checkpoints: when all branches are updated, run "
            "test_fusion.py --false-alarm-rate again"
        )


def roll_back(paths: Iterable[Path]) -> None:
    """Put back the checkpoints from before the last update, to the byte; raises InputError if one is not there."""
    formers = {}
    with contextlib.ExitStack() as locks:
        for path in paths:
            locks.enter_context(file_lock(path))
            training = read_metadata(path).get("training")
            digest = training.get("former") if isinstance(training, dict) else None
            if not isinstance(digest, str):
                raise InputError(
                    f"{path} was not updated: there is no former checkpoint to put back; leave its category out"
                )
            formers[path] = _former(path, digest)
            if not formers[path].is_file() or sha256_of_file(formers[path]) != digest:
                raise InputError(f"{formers[path]}, the checkpoint from before the last --update, is gone or damaged")
        for path, former in formers.items():
            os.replace(former, path)
            print(f"{path} is again the checkpoint from before the last --update")
    for folder in (path.parent for path in formers if (path.parent / FILE_NAME).exists()):
        meaning = "other checkpoints: roll all branches back, or run test_fusion.py --false-alarm-rate again"
        with contextlib.suppress(InputError):  # a checkpoint is missing, or usad.json damaged
            if OperatingPoint.read(folder).checkpoints == checkpoint_digests(folder):
                meaning = "these checkpoints: they are valid again"
        print(f"{folder / FILE_NAME} has thresholds for {meaning}")


def _former(path: Path, digest: str) -> Path:
    return path.with_name(f"{path.stem}.former-{digest[:16]}{path.suffix}")
