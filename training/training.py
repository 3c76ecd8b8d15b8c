"""From the images of a category to the checkpoint and results of a branch: what the training scripts share."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Category, Sample, default_holdout, split_training
from datasets.region import RegionOfInterest
from evaluation.evaluate import average, average_path, evaluate
from models.branches import BRANCHES
from models.branches.branch import Branch
from models.branches.calibration import BORDER_IMAGES, calibrate
from models.branches.frames import TrainingFrames, mark
from models.branches.tiling import Tiling
from models.fusion.checkpoints import checkpoint_path
from models.fusion.usad import USAD
from models.networks.backbones import BackboneSpec, build_backbone, empty_backbone
from models.networks.weights import own_normalization
from training.categories import opened_categories
from training.options import Default, data_settings, record, run_settings
from training.settings import RunSettings, SplitSettings
from training.update import Present, portion, present_checkpoint, replace, roll_back, settings_in
from utils.command_line import warn
from utils.distributed import is_main_process
from utils.errors import InputError, UnreadableError
from utils.gather import from_first, one_per_machine_first, require_same
from utils.settings import setting_names


def train(args: argparse.Namespace, name: str) -> None:
    """Fit, update or roll back the branch of that name on each category, and unless --no-eval test it.

    `args` are the flags of `training_parser`, and one for each setting of the branch.
    """

    def checkpoint_of(category: str) -> Path:
        return checkpoint_path(args.models_dir / category, name)

    if args.rollback:
        categories = args.category  # whose images need not be there
        if categories == ["all"]:
            categories = data_settings(args).categories
        if is_main_process():
            roll_back(map(checkpoint_of, dict.fromkeys(categories)))
        return
    data, run, branch_class = data_settings(args), run_settings(args), BRANCHES[name]
    average_file = average_path(data.results_dir, name)
    results = None if args.no_eval else name
    roi = args.roi and RegionOfInterest.read(args.roi, data.decoding)
    if branch_class.state is Branch.state:
        raise InputError(
            f"branch '{name}' lacks state and load_state, which a checkpoint needs; see docs/architecture.md"
        )
    if args.tiles not in (None, 1) and branch_class.predict is not Branch.predict:
        raise InputError(f"--tiles: branch '{name}' looks at whole frames; leave it out")
    present = {}
    if args.update:
        if branch_class.update is Branch.update:
            raise InputError(f"--update: branch '{name}' cannot take in new frames; train it again on all")
        present = {category: present_checkpoint(checkpoint_of(category), args, roi) for category in data.categories}
        learned = partial(updated_branches, args, branch_class, run, present, checkpoint_of)
    else:
        learned = partial(fitted_branches, args, branch_class, run, network_spec(args, branch_class), roi)

    def samples_of(category: Category) -> list[Sample]:
        samples = category.train_samples()
        if category.name in present:
            samples = present[category.name].frames.not_fitted(samples)
        return samples + ([] if args.no_eval else category.test_samples())

    metrics, depths = {}, {category: before.bit_depth for category, before in present.items()}
    with opened_categories(data, samples_of, run.workers, depths, results, checkpoint_of) as categories:
        for category, branch in learned(categories):
            path = checkpoint_of(category.name)
            if is_main_process():
                (replace if args.update else Branch.save)(branch, path)
            print(f"{category.name}: wrote {path}", flush=True)
            if not args.no_eval:
                in_force = {key: value for key, value in settings_in(branch.metadata()).items() if key in vars(args)}
                network = {"backbone": branch.backbone.spec.to_dict()}
                metrics[category.name] = tested(args, run, category, branch, in_force, network)
    average(name, average_file, metrics)


def network_spec(args: argparse.Namespace, branch_class: type[Branch]) -> BackboneSpec:
    """The network from the flags. Raises InputError, before anything is downloaded, if it cannot be had."""
    spec = BackboneSpec(
        branch_class.backbone_kind,
        args.backbone,
        args.image_size,
        position_size=getattr(args, "position_size", None),
        seed=args.seed,
        normalize_contrast=args.normalize_contrast,
    ).with_weights(args.weights)
    empty_backbone(spec)
    Tiling(args.tiles, spec.image_size)  # raises if that cannot be
    if spec.weights == "file" and not Path(spec.file).is_file():
        raise InputError(f"--weights {spec.file}: no such file")
    return own_normalization(spec)


def fitted_branches(
    args: argparse.Namespace,
    branch_class: type[Branch],
    run: RunSettings,
    spec: BackboneSpec,
    roi: RegionOfInterest | None,
    categories: Sequence[Category],
) -> Iterator[tuple[Category, Branch]]:
    """A new branch for each category, all with one network."""
    split = SplitSettings(args.train_ratio, args.holdout_ratio, args.seed)
    by_default = isinstance(args.holdout_ratio, Default)
    splits = [suited_split(split, category, by_default) for category in categories]
    settings = {name: getattr(args, name) for name in setting_names(branch_class)}
    with one_per_machine_first():
        backbone = build_backbone(spec, run.device, precision=run.precision)
    for category, split in zip(categories, splits, strict=True):
        branch = branch_class(backbone, **settings)
        branch.settings()  # raises, before the fit, if one is not kept
        branch.roi, branch.bit_depth, branch.tiles = roi, category.decoding.bit_depth, args.tiles
        yield category, fit_branch(run, category, split, branch)


def updated_branches(
    args: argparse.Namespace,
    branch_class: type[Branch],
    run: RunSettings,
    present: dict[str, Present],
    checkpoint_of: Callable[[str], Path],
    categories: Sequence[Category],
) -> Iterator[tuple[Category, Branch]]:
    """The branch of each category that has new frames, which it has taken in."""
    for category in categories:
        before = present[category.name]
        new = portion(category, before)
        if new is None:
            print(f"{category.name}: no new frames in {category.folder / 'train' / 'good'}; nothing is changed")
            continue
        path = checkpoint_of(category.name)
        with one_per_machine_first():
            branch = branch_class.load(path, args.weights, run.device, run.precision, flag="--weights")
        if branch.frames != before.frames:  # which were read before the checkpoint was locked
            raise InputError(f"{path} has just been changed by another run; start this one again")
        learn(run, branch, branch.update, new.fitted, new.held_out)
        branch.frames = new.frames
        branch.backbone.spec = dataclasses.replace(branch.backbone.spec, precision=before.precision)
        branch.training |= {
            "images": before.images + len(new.fitted),
            "left_out": sorted({*before.left_out, *left_out_of(category)}),
        }
        print(f"{category.name}: took in {len(new.fitted)} new frames; {len(new.held_out)} are held out", flush=True)
        yield category, branch


def suited_split(split: SplitSettings, category: Category, by_default: bool) -> SplitSettings:
    """The split for a category, checked; with few images a holdout ratio that is only a default gives way."""
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
    try:
        learn(run, branch, branch.fit, fitted, held)
    except UnreadableError:
        raise
    except InputError as error:
        raise InputError(f"{category.name}: {error}") from None
    branch.frames = TrainingFrames.named((sample.name for sample in samples), (sample.name for sample in held))
    branch.training = {"category": category.name, "images": len(fitted), "left_out": left_out_of(category)}
    branch.training |= dataclasses.asdict(split)
    return branch


def evenly_spaced(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` of the samples, from the first to the last; none if `count` is not positive."""
    count = min(count, len(samples))
    return [samples[index * len(samples) // count] for index in range(count)]


def learn(
    run: RunSettings,
    branch: Branch,
    fit: Callable[[ImageLoader], None],
    fitted: Sequence[Sample],
    held: Sequence[Sample],
) -> None:
    """Let `fit`, a method of the branch, see the images, then take statistics on the held-out ones; either if any."""
    if fitted:
        dataset = ImageDataset(fitted, branch.image_size, "bilinear", branch.roi)
        fit(branch.batches(make_loader(run, dataset, f"{branch.name} fit", branch.device, branch.tiles)))
        learned = from_first(branch.state)
        if not is_main_process():
            branch.load_state(learned)
    if held:
        some = evenly_spaced(fitted, BORDER_IMAGES - len(held))
        more = test_loader(run, some, branch, "border") if some else ()
        branch.calibration = calibrate(branch, test_loader(run, held, branch, "held out"), more)


def tested(
    args: argparse.Namespace,
    run: RunSettings,
    category: Category,
    model: Branch | USAD,
    settled: dict[str, Any],
    config: dict[str, Any],
) -> dict[str, Any]:
    """Test the model; returns its figures. `settled` values replace flags in config.json, which also gets `config`."""
    folder = args.results_dir / category.name / model.name
    config = {
        "settings": record(args, **settled | dataclasses.asdict(run)),
        "left_out": category.left_out,
        "roi_share": model.roi and model.roi.share,
        **config,
    }
    loader = test_loader(run, category.test_samples(), model, "test")
    return evaluate(model, loader, folder, config, not args.no_images, args.save_maps)


def left_out_of(category: Category) -> list[str]:
    """The training images that could not be read."""
    return sorted(name for name in category.left_out if name.startswith("train/"))


def held_out_samples(category: Category, branches: Sequence[Branch]) -> list[Sample]:
    """The normal training images that no branch was fitted on; raises InputError if there are none, or one is gone."""
    held = {branch.frames.held_out for branch in branches}
    if not all(held):
        raise InputError(
            f"the checkpoints of {category.name} name no held-out normal images; train the three branches "
            "with --holdout-ratio, for instance 0.2"
        )
    if len(held) > 1:
        raise InputError(
            f"the branches of {category.name} did not hold out the same images; train the three with the "
            "same --holdout-ratio and --seed, or --update the others, too"
        )
    samples = [sample for sample in category.train_samples() if mark(sample.name) in branches[0].frames.held_out]
    other = {branch.training.get("category") for branch in branches} != {category.name}
    if other or len(samples) < len(branches[0].frames.held_out):
        raise InputError(
            f"{category.folder} does not hold the training images that the checkpoints held out; restore them or "
            "train again"
        )
    return samples


def test_loader(run: RunSettings, samples: Sequence[Sample], model: Branch | USAD, purpose: str) -> ImageLoader:
    """A loader of the images as a test of the branch or the fusion sees them."""
    dataset = ImageDataset(samples, model.image_size, "bicubic", model.roi)
    return make_loader(run, dataset, f"{model.name} {purpose}", model.device, model.tiles)


def make_loader(
    run: RunSettings, dataset: ImageDataset, description: str, device: torch.device | str, tiles: int = 1
) -> ImageLoader:
    """A loader for `device` with the run's workers, and as many frames a batch as make its batch size in tiles."""
    require_same("images in --data-root", lambda: (sample.name for sample in dataset.samples))
    pin_memory = torch.device(device).type == "cuda"
    return ImageLoader(dataset, max(1, run.batch_size // tiles**2), run.workers, description, pin_memory)
