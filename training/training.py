"""From the images of a category to the checkpoint and results of a branch: what the training scripts share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Category, Sample, default_holdout, split_training
from datasets.region import RegionOfInterest
from evaluation.evaluate import evaluate, print_average, print_metrics
from evaluation.result_files import average_path
from models.branches import BRANCHES
from models.branches.branch import Branch
from models.branches.calibration import BORDER_IMAGES, calibrate
from models.fusion.checkpoints import checkpoint_path
from models.networks.backbones import BackboneSpec, build_backbone, empty_backbone
from training.categories import opened_categories
from training.options import Default, data_settings, record, run_settings
from training.settings import RunSettings, SplitSettings
from utils.command_line import warn
from utils.distributed import is_main_process
from utils.errors import InputError
from utils.files import digest_of_lines
from utils.gather import from_first, one_per_machine_first, require_same


def train(args: argparse.Namespace, name: str, **settings: Any) -> None:
    """Fit the branch of that name on each category, write its checkpoint and, unless --no-eval, its results.

    `args` are the flags of `training_parser`, `settings` the branch's own.
    """
    branch_class, run, split = BRANCHES[name], run_settings(args), split_settings(args)
    spec = BackboneSpec(
        branch_class.backbone_kind,
        args.backbone,
        args.image_size,
        position_size=getattr(args, "position_size", None),
        seed=args.seed,
        normalize_contrast=args.normalize_contrast,
    ).with_weights(args.weights)
    empty_backbone(spec)  # finds sizes that do not suit the network before anything is downloaded
    if spec.weights == "file" and not Path(spec.file).is_file():
        raise InputError(f"--weights {spec.file}: no such file")
    data = data_settings(args)
    roi = args.roi and RegionOfInterest.read(args.roi, data.decoding)
    average = average_path(data.results_dir, name)

    def samples_of(category: Category) -> list[Sample]:
        return category.train_samples() + ([] if args.no_eval else category.test_samples())

    def checkpoint_of(category: str) -> Path:
        return checkpoint_path(args.models_dir / category, name)

    results = None if args.no_eval else name
    metrics = {}
    with opened_categories(data, samples_of, run.workers, results, checkpoint_of) as categories:
        by_default = isinstance(args.holdout_ratio, Default)
        splits = {category.name: suited_split(split, category, by_default) for category in categories}
        with one_per_machine_first():
            backbone = build_backbone(spec, run.device, precision=run.precision)
        for category in categories:
            branch = branch_class(backbone, **settings)
            branch.roi, branch.bit_depth = roi, category.decoding.bit_depth
            split = splits[category.name]
            fit_branch(run, category, split, branch)
            if is_main_process():
                branch.save(checkpoint_of(category.name))
            print(f"{category.name}: wrote {checkpoint_of(category.name)}", flush=True)
            if args.no_eval:
                continue
            dataset = ImageDataset(category.test_samples(), branch.image_size, "bicubic", roi)
            loader = make_loader(run, dataset, f"{name} test", branch.device)
            folder = data.results_dir / category.name / name
            config = {
                "settings": record(
                    args, category=category.name, holdout_ratio=split.holdout_ratio, **dataclasses.asdict(run)
                ),
                "left_out": category.left_out,
                "backbone": branch.backbone.spec.to_dict(),
            }
            metrics[category.name] = evaluate(branch, loader, folder, config, not args.no_images, args.save_maps)
            if is_main_process():
                print_metrics(name, metrics[category.name])
                print(f"{category.name}: results in {folder}", flush=True)
    print_average(name, average, metrics)


def split_settings(args: argparse.Namespace) -> SplitSettings:
    """Which images are fitted on, from the flags."""
    return SplitSettings(args.train_ratio, args.holdout_ratio, args.seed)


def suited_split(split: SplitSettings, category: Category, by_default: bool) -> SplitSettings:
    """The split for a category; with few images a holdout ratio that is only a default is changed, with a message.

    Raises InputError if no image is left to fit on, or too few are held out.
    """
    samples = category.train_samples()
    ratio = default_holdout(split.holdout_ratio, len(samples)) if by_default else split.holdout_ratio
    suited = dataclasses.replace(split, holdout_ratio=ratio)
    _, held = split_training(samples, suited.train_ratio, suited.holdout_ratio, suited.seed)
    if ratio != split.holdout_ratio:
        meaning = "" if held else ": no thresholds, and the fusion is the paper's. More images would allow both"
        warn(f"{category.name}: of only {len(samples)} training images {len(held) or 'none'} are held out{meaning}")
    return suited


def fit_branch(run: RunSettings, category: Category, split: SplitSettings, branch: Branch) -> Branch:
    """Fit on the training share, then take statistics on the held-out images, if there are any."""
    samples = category.train_samples()
    fitted, held = split_training(samples, split.train_ratio, split.holdout_ratio, split.seed)
    dataset = ImageDataset(fitted, branch.image_size, "bilinear", branch.roi)
    branch.fit(make_loader(run, dataset, f"{branch.name} fit", branch.device))
    learned = from_first(branch.state)
    if not is_main_process():
        branch.load_state(learned)
    if held:
        branch.calibration = calibrate(
            branch,
            test_loader(run, held, branch, "held out"),
            test_loader(run, evenly_spaced(fitted, BORDER_IMAGES - len(held)), branch, "border"),
        )
    branch.training = {
        "category": category.name,
        "images": len(fitted),
        "left_out": sorted(name for name in category.left_out if name.startswith("train/")),
        "files_digest": fitted_digest(samples, held),
        "train_ratio": split.train_ratio,
        "holdout_ratio": split.holdout_ratio,
        "seed": split.seed,
    }
    return branch


def evenly_spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of the samples, from the first to the last; none if `count` is not positive."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def held_out_samples(category: Category, branches: Sequence[Branch]) -> list[Sample]:
    """The normal training images that no branch was fitted on.

    Raises InputError if no images were held out, or the files are no longer those of the training.
    """
    keys = ("category", "holdout_ratio", "seed", "files_digest")
    trainings = {tuple(branch.training.get(key) for key in keys) for branch in branches}
    if not all(ratio for _, ratio, *_ in trainings):
        raise InputError(
            f"the checkpoints of {category.name} have no held-out normal images; train the three branches "
            "with --holdout-ratio, for instance 0.2"
        )
    if len(trainings) > 1:
        raise InputError(
            f"the branches of {category.name} did not hold out the same images; train the three with the "
            "same --holdout-ratio and --seed"
        )
    ((name, ratio, seed, digest),) = trainings
    left_out = {unread for branch in branches for unread in branch.training.get("left_out", ())}
    samples = [sample for sample in category.train_samples() if sample.name not in left_out]
    _, held = split_training(samples, 1.0, ratio, seed)
    if name != category.name or digest != fitted_digest(samples, held):
        raise InputError(
            f"{category.folder} does not hold the training images that the checkpoints were fitted on, so "
            "that the held-out ones cannot be told from them; restore them or train again"
        )
    return held


def fitted_digest(samples: Sequence[Sample], held: Sequence[Sample]) -> str:
    """A digest of the names of the training images without those held out."""
    held_names = {sample.name for sample in held}
    return digest_of_lines(sample.name for sample in samples if sample.name not in held_names)


def test_loader(
    run: RunSettings, samples: Sequence[Sample], branch: Branch, description: str
) -> Iterable[dict[str, Any]]:
    """Batches of the images as a test sees them."""
    if not samples:
        return ()
    dataset = ImageDataset(samples, branch.image_size, "bicubic", branch.roi)
    return make_loader(run, dataset, f"{branch.name} {description}", branch.device)


def make_loader(run: RunSettings, dataset: ImageDataset, description: str, device: torch.device | str) -> ImageLoader:
    """A loader for `device` with the run's batch size and workers."""
    require_same("images in --data-root", lambda: (sample.name for sample in dataset.samples))
    pin_memory = torch.device(device).type == "cuda"
    return ImageLoader(dataset, run.batch_size, run.workers, description, pin_memory)
