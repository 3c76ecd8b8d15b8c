"""What the three training scripts share: their flags, and the way from images to checkpoint and results."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datasets.coalad import ensure_coalad
from datasets.mvtec import Category, ImageDataset, ImageLoader, find_categories, split_training
from models.backbones import BackboneSpec, build_backbone
from models.branch import Branch
from models.calibration import calibrate
from utils.checkpoint import check_replaceable
from utils.cli import (
    Parser,
    add_data_flags,
    add_run_flags,
    choose_device,
    default_batch_size,
    default_workers,
    number,
)
from utils.errors import InputError
from utils.evaluate import claim_folder, evaluate, print_metrics, write_average
from utils.files import digest_of_lines

share = number(float, 0, 1, above=True)


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
        help="pretrained, demo (ships with the project), random, or a .safetensors/.pth file (default: pretrained)",
    )
    group.add_argument("--image-size", type=number(int, 1), default=image_size, help=f"default: {image_size}")
    group = parser.add_argument_group("fit")
    group.add_argument("--train-ratio", type=share, default=train_ratio, help=f"default: {train_ratio:g}")
    group.add_argument(
        "--holdout-ratio",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the normal training images kept out of the fit, for --fusion standardized (default: 0)",
    )
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=22)
    add_run_flags(parser)
    parser.add_argument("--no-eval", action="store_true", help="stop after the checkpoint is written")
    return parser


def add_token_flags(parser: Parser) -> None:
    """The flags of the two branches that fit a Gaussian to a ViT's tokens."""
    parser.add_argument(
        "--position-size",
        type=number(int, 1),
        help="input size at which position embeddings are first laid out (default: the image size)",
    )
    parser.add_argument(
        "--covariance",
        choices=("empirical", "ledoit-wolf"),
        default="empirical",
        help="ledoit-wolf (shrinkage) suits fewer images than the network has channels",
    )


def run_training(args: argparse.Namespace, branch_class: type[Branch], **settings: Any) -> None:
    """Fit the branch on each category, write its checkpoint and, unless --no-eval, its results."""
    if args.no_eval and (args.save_maps or args.no_images):
        raise InputError("--save-maps and --no-images have no effect with --no-eval; drop one of them")
    device = choose_device(args.device, args.precision)
    categories = [
        open_category(args.data_root, name) for name in find_categories(args.data_root, args.category)
    ]
    for category in categories:
        split_training(category.train_items(), args.train_ratio, args.holdout_ratio, args.seed)
        check_replaceable(checkpoint_path(args.models_dir, category.name, branch_class))
        if not args.no_eval:
            category.test_items()
            claim_folder(args.results_dir / category.name / branch_class.name)
    spec = BackboneSpec(
        branch_class.backbone_kind,
        args.backbone,
        args.image_size,
        position_size=getattr(args, "position_size", None),
        seed=args.seed,
    ).with_weights(args.weights)
    backbone = build_backbone(spec, device, precision=args.precision)
    metrics = {}
    for category in categories:
        branch = fit_branch(args, category, branch_class(backbone, **settings))
        path = checkpoint_path(args.models_dir, category.name, branch_class)
        branch.save(path)
        print(f"{category.name}: wrote {path}", flush=True)
        if not args.no_eval:
            metrics[category.name] = test_branch(args, category, branch)
    if len(metrics) > 1:
        average = write_average(args.results_dir / f"average_{branch_class.name}.json", metrics)
        print(f"average of {len(metrics)} categories")
        print_metrics(branch_class.name, average)


def fit_branch(args: argparse.Namespace, category: Category, branch: Branch) -> Branch:
    """Fit on the training share, then take statistics on the images held out, if any."""
    items = category.train_items()
    fitted, held = split_training(items, args.train_ratio, args.holdout_ratio, args.seed)
    branch.fit(
        make_loader(args, ImageDataset(fitted, branch.image_size, "bilinear"), f"{branch.name} fit", branch)
    )
    if held:
        dataset = ImageDataset(held, branch.image_size, "bicubic")
        branch.calibration = calibrate(branch, make_loader(args, dataset, f"{branch.name} held out", branch))
    held_names = {item.name for item in held}
    branch.training = {
        "category": category.name,
        "images": len(fitted),
        "files_digest": digest_of_lines(item.name for item in items if item.name not in held_names),
        "train_ratio": args.train_ratio,
        "holdout_ratio": args.holdout_ratio,
        "seed": args.seed,
    }
    return branch


def test_branch(args: argparse.Namespace, category: Category, branch: Branch) -> dict[str, Any]:
    """The branch's own results at its own input size."""
    dataset = ImageDataset(category.test_items(), branch.image_size, "bicubic")
    folder = args.results_dir / category.name / branch.name
    config = {"settings": settings_in_force(args, category), "backbone": branch.backbone.spec.to_dict()}
    metrics = evaluate(
        branch,
        make_loader(args, dataset, f"{branch.name} test", branch),
        folder,
        config,
        images=not args.no_images,
        save_maps=args.save_maps,
    )
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
    """A loader with the batch size and the workers that the flags, or else the device, ask for."""
    device = str(model.device)
    batch_size = args.batch_size or default_batch_size(device)
    workers = default_workers(device) if args.workers is None else args.workers
    return ImageLoader(dataset, batch_size, workers, description, pin_memory=device.startswith("cuda"))


def settings_in_force(args: argparse.Namespace, category: Category) -> dict[str, Any]:
    """The flags as JSON values, for config.json."""
    values = {
        key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())
    }
    return {**values, "category": category.name}
