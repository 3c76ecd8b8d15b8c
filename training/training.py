"""What the three training scripts share: their flags, and the way from images to checkpoint and results."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets.coalad import ensure_coalad
from datasets.loading import ImageDataset, ImageLoader
from datasets.mvtec import Category, Sample, find_categories, split_training
from datasets.unreadable import leave_out_unreadable, list_all_unreadable
from evaluation.evaluate import evaluate, print_metrics
from evaluation.result_files import average_path, claim_folder, write_average
from models.branches.branch import Branch
from models.branches.calibration import calibrate
from models.branches.gaussian import COVARIANCES
from models.networks.backbones import MAX_SIDE, BackboneSpec, build_backbone, empty_backbone
from models.networks.wavelets import NAME as DEMO_NETWORK
from utils import distributed
from utils.checkpoint import check_replaceable
from utils.command_line import (
    Parser,
    add_data_flags,
    add_run_flags,
    add_skip_flag,
    number,
    settle_run,
)
from utils.errors import InputError
from utils.files import digest_of_lines
from utils.locks import file_lock, folder_lock

share = number(float, 0, 1, above=True)
side = number(int, 1, MAX_SIDE)  # of a square input in pixels


# What suits the network that ships, and the small data sets that it is for.
DEMO_DEFAULTS = {
    "backbone": DEMO_NETWORK,
    "image_size": 400,
    "holdout_ratio": 0.2,
}


def training_parser(description: str, backbone: str, image_size: int, train_ratio: float) -> Parser:
    """The flags that all three training scripts take, with the branch's own defaults."""
    parser = Parser(description)
    add_data_flags(parser)
    parser.add_argument(
        "--models-dir",
        type=Path,
        default=Path("trained_models"),
        help="the checkpoint goes to <models-dir>/<category>/",
    )
    group = parser.add_argument_group("network")
    group.add_argument("--backbone", default=backbone, help=f"a timm name (default: {backbone})")
    group.add_argument(
        "--weights",
        default="pretrained",
        help="pretrained, demo (the network that ships), random (untrained), or a .safetensors/.pth file "
        "(default: pretrained)",
    )
    group.add_argument("--image-size", type=side, default=image_size, help=f"default: {image_size}")
    group.add_argument(
        "--normalize-contrast",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="bring each image to one mean colour and one contrast first (the demo network does that by itself)",
    )
    group = parser.add_argument_group("fit")
    group.add_argument("--train-ratio", type=share, default=train_ratio, help=f"default: {train_ratio:g}")
    group.add_argument(
        "--holdout-ratio",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the normal training images kept out of the fit, for --fusion standardized and for "
        "thresholds (default: 0)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=22)
    add_run_flags(parser)
    add_skip_flag(parser)
    parser.add_argument("--no-eval", action="store_true", help="stop after the checkpoint is written")
    return parser


def parse_training(parser: Parser, **demo_defaults: Any) -> argparse.Namespace:
    """The flags as given; with `--weights demo` its defaults, said aloud, stand for those that are not given."""
    args = parser.parse_args()
    if args.weights != "demo":
        return args
    defaults = DEMO_DEFAULTS | demo_defaults
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    in_force = (f"{key.replace('_', '-')} {getattr(args, key)}" for key in defaults)
    print(f"with --weights demo: {', '.join(in_force)}", flush=True)
    return args


def add_token_flags(parser: Parser) -> None:
    """The flags of the two branches that fit a Gaussian to a ViT's tokens."""
    parser.add_argument(
        "--position-size",
        type=side,
        help="input size at which position embeddings are first laid out (default: the image size)",
    )
    parser.add_argument(
        "--covariance",
        choices=COVARIANCES,
        default="empirical",
        help="ledoit-wolf (shrinkage) suits fewer images than the network has channels",
    )


def add_budget_flag(parser: Parser, default: float) -> None:
    """The flag of the branches that learn from the training images' patches themselves."""
    parser.add_argument(
        "--patch-budget",
        type=number(float, 0, above=True),
        default=default,
        help="GB (10^9 bytes) of memory for the training patches; of more of them a seeded sample is taken, as many of "
        f"each image (default: {default:g})",
    )


def run_training(args: argparse.Namespace, branch_class: type[Branch], **settings: Any) -> None:
    """Fit the branch on each category, write its checkpoint and, unless --no-eval, its results."""
    if args.no_eval and (args.save_maps or args.no_images):
        raise InputError("--save-maps and --no-images have no effect with --no-eval; drop one of them")
    settle_run(args)
    spec = BackboneSpec(
        branch_class.backbone_kind,
        args.backbone,
        args.image_size,
        position_size=getattr(args, "position_size", None),
        seed=args.seed,
        normalize_contrast=args.normalize_contrast,
    ).with_weights(args.weights)
    empty_backbone(spec)  # sizes that do not suit the network are found before anything is downloaded
    if spec.weights == "file" and not Path(spec.file).is_file():
        raise InputError(f"--weights {spec.file}: no such file")
    names = find_categories(args.data_root, args.category)
    average = average_path(args.results_dir, branch_class.name)
    with contextlib.ExitStack() as locks:
        for name in names:
            path, folder = checkpoint_path(args.models_dir, name, branch_class), args.results_dir / name
            check_replaceable(path)
            locks.enter_context(file_lock(path))
            if not args.no_eval:
                claim_folder(folder / branch_class.name)
                locks.enter_context(folder_lock(folder / branch_class.name))
        with distributed.one_per_machine_first():
            categories = [open_category(args.data_root, name) for name in names]
        with list_all_unreadable(categories, partial(samples_in_use, args), args.workers, args.skip_unreadable):
            metrics = train_and_test(args, categories, branch_class, spec, settings)
    if len(metrics) > 1 and distributed.is_main_process():
        print(f"average of {len(metrics)} categories")
        print_metrics(branch_class.name, write_average(average, metrics))


def train_and_test(
    args: argparse.Namespace,
    categories: Sequence[Category],
    branch_class: type[Branch],
    spec: BackboneSpec,
    settings: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The figures of each category, none with --no-eval."""
    for category in categories:
        if args.skip_unreadable:
            leave_out_unreadable(category, samples_in_use(args, category), args.workers)
        split_training(category.train_samples(), args.train_ratio, args.holdout_ratio, args.seed)
        if not args.no_eval:
            category.test_samples()
    with distributed.one_per_machine_first():
        backbone = build_backbone(spec, args.device, precision=args.precision)
    metrics = {}
    for category in categories:
        branch = fit_branch(args, category, branch_class(backbone, **settings))
        path = checkpoint_path(args.models_dir, category.name, branch_class)
        if distributed.is_main_process():
            branch.save(path)
        print(f"{category.name}: wrote {path}", flush=True)
        if not args.no_eval:
            metrics[category.name] = test_branch(args, category, branch)
    return metrics


def samples_in_use(args: argparse.Namespace, category: Category) -> list[Sample]:
    """What the run may read of a category."""
    return category.train_samples() + ([] if args.no_eval else category.test_samples())


def fit_branch(args: argparse.Namespace, category: Category, branch: Branch) -> Branch:
    """Fit on the training share, then take statistics on the images held out, if any."""
    samples = category.train_samples()
    fitted, held = split_training(samples, args.train_ratio, args.holdout_ratio, args.seed)
    branch.fit(make_loader(args, ImageDataset(fitted, branch.image_size, "bilinear"), f"{branch.name} fit", branch))
    learned = distributed.from_first(branch.state)
    if not distributed.is_main_process():
        branch.load_state(learned)
    if held:
        dataset = ImageDataset(held, branch.image_size, "bicubic")
        branch.calibration = calibrate(branch, make_loader(args, dataset, f"{branch.name} held out", branch))
    branch.training = {
        "category": category.name,
        "images": len(fitted),
        "left_out": sorted(name for name in category.left_out if name.startswith("train/")),
        "files_digest": fitted_digest(samples, held),
        "train_ratio": args.train_ratio,
        "holdout_ratio": args.holdout_ratio,
        "seed": args.seed,
    }
    return branch


def held_out_samples(category: Category, branches: Sequence[Branch]) -> list[Sample]:
    """The normal training images that none of the branches was fitted on.

    Raises InputError where none were held out, or the files are no longer those of the training.
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
    """A mark of the training images without those held out."""
    held_names = {sample.name for sample in held}
    return digest_of_lines(sample.name for sample in samples if sample.name not in held_names)


def test_branch(args: argparse.Namespace, category: Category, branch: Branch) -> dict[str, Any]:
    """The branch's own results at its own input size; its maps as the fusion will take them."""
    branch.rescale_maps = branch.backbone.spec.weights != "demo" or branch.calibration is None
    dataset = ImageDataset(category.test_samples(), branch.image_size, "bicubic")
    folder = args.results_dir / category.name / branch.name
    config = {
        "settings": settings_in_force(args, category),
        "left_out": category.left_out,
        "backbone": branch.backbone.spec.to_dict(),
    }
    metrics = evaluate(
        branch,
        make_loader(args, dataset, f"{branch.name} test", branch),
        folder,
        config,
        images=not args.no_images,
        save_maps=args.save_maps,
    )
    if distributed.is_main_process():
        print_metrics(branch.name, metrics)
        print(f"{category.name}: results in {folder}", flush=True)
    return metrics


def open_category(root: Path, name: str) -> Category:
    """The category's files; CoalAD is downloaded on first use."""
    if name == "coal_ad":
        ensure_coalad(root)
    return Category(root, name)


def checkpoint_path(models_dir: Path, category: str, branch_class: type[Branch]) -> Path:
    """Where the branch's checkpoint of a category lies."""
    return models_dir / category / f"{branch_class.name}.safetensors"


def make_loader(args: argparse.Namespace, dataset: ImageDataset, description: str, model: Any) -> ImageLoader:
    """A loader for `model`'s device with the batch size and the workers of the settled flags."""
    distributed.require_same("images in --data-root", lambda: (sample.name for sample in dataset.samples))
    pin_memory = torch.device(model.device).type == "cuda"
    return ImageLoader(dataset, args.batch_size, args.workers, description, pin_memory)


def settings_in_force(args: argparse.Namespace, category: Category) -> dict[str, Any]:
    """The flags as JSON values, for config.json."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}
    return {**values, "category": category.name}
