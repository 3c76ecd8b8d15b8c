"""Fuse the three branches and report image AUROC, pixel AUROC and PRO.

python test_fusion.py                                    # saved_models/coal_ad on data/coal_ad
python test_fusion.py --models-dir trained_models --category my_belt --fusion standardized
python test_fusion.py --false-alarm-rate 0.01            # and the thresholds that predict.py uses
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path
from typing import Any

from datasets.loading import ImageDataset
from datasets.mvtec import Category, Sample, find_categories
from datasets.unreadable import leave_out_unreadable, list_all_unreadable
from evaluation.evaluate import evaluate, print_metrics
from evaluation.result_files import average_path, claim_folder, write_average
from models import BRANCHES, USAD
from models.fusion.operating_point import OperatingPoint, checkpoint_digests, find_operating_point
from models.fusion.usad import checkpoint_paths
from training.training import held_out_samples, make_loader, open_category, settings_in_force
from utils import distributed
from utils.command_line import (
    Parser,
    add_data_flags,
    add_fusion_flags,
    add_run_flags,
    add_skip_flag,
    add_weights_flags,
    check_fusion,
    number,
    run,
    settle_fusion,
    settle_run,
    warn,
    weights_by_branch,
)
from utils.locks import folder_lock


def main() -> None:
    args = parse_args()
    device = settle_run(args)
    names = find_categories(args.data_root, args.category)
    settle_fusion(args, [args.models_dir / name for name in names])
    average = average_path(args.results_dir, USAD.name)
    with contextlib.ExitStack() as locks:
        for name in names:
            checkpoint_paths(args.models_dir / name)
            claim_folder(args.results_dir / name / USAD.name)
            locks.enter_context(folder_lock(args.results_dir / name / USAD.name))
        with distributed.one_per_machine_first():
            categories = [open_category(args.data_root, name) for name in names]
        with list_all_unreadable(categories, partial(samples_in_use, args), args.workers, args.skip_unreadable):
            for category in categories:
                if args.skip_unreadable:
                    leave_out_unreadable(category, category.test_samples(), args.workers)
                category.test_samples()
            metrics = {category.name: test(args, category, device) for category in categories}
    if len(metrics) > 1 and distributed.is_main_process():
        print(f"average of {len(metrics)} categories")
        print_metrics(USAD.name, write_average(average, metrics))


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_flags(parser)
    parser.add_argument(
        "--models-dir", type=Path, default=Path("saved_models"), help="holds <category>/<branch>.safetensors"
    )
    add_fusion_flags(parser)
    parser.add_argument(
        "--false-alarm-rate",
        type=number(float, 0, 0.5, above=True),
        help="find the thresholds for this rate on the held-out normal images; they go to <models-dir>/<category>/"
        "usad.json, for predict.py",
    )
    add_weights_flags(parser, BRANCHES)
    add_run_flags(parser)
    add_skip_flag(parser)
    args = parser.parse_args()
    check_fusion(args)
    return args


def test(args: argparse.Namespace, category: Category, device: str) -> dict[str, Any]:
    """Load the category's three checkpoints, test their fusion and write its results."""
    checkpoints = args.models_dir / category.name
    distributed.require_same("checkpoints in --models-dir", lambda: checkpoint_digests(checkpoints).values())
    with distributed.one_per_machine_first():
        usad = USAD.load(
            checkpoints,
            device,
            args.precision,
            weights=weights_by_branch(args, BRANCHES),
            score_weights={"ma_clu": args.lambda_obj},
            lambda_map=args.lambda_map,
            fusion=args.fusion,
        )
    if len({branch.training.get("files_digest") for branch in usad.branches} - {None}) > 1:
        warn(f"the branches of {category.name} were trained on different lists of files")
    if args.false_alarm_rate:
        usad.set_operating_point(calibrate_fusion(args, category, usad, checkpoints))
    dataset = ImageDataset(category.test_samples(), usad.image_size, "bicubic")
    folder = args.results_dir / category.name / usad.name
    branches = {
        branch.name: {
            "backbone": branch.backbone.spec.to_dict(),
            **branch.settings(),
            "training": branch.training,
        }
        for branch in usad.branches
    }
    metrics = evaluate(
        usad,
        make_loader(args, dataset, "fusion test", usad),
        folder,
        {"settings": settings_in_force(args, category), "left_out": category.left_out, "branches": branches},
        images=not args.no_images,
        save_maps=args.save_maps,
        operating_point=usad.operating_point,
    )
    if distributed.is_main_process():
        print_metrics(usad.name, metrics)
        print(f"{category.name}: results in {folder}", flush=True)
    return metrics


def samples_in_use(args: argparse.Namespace, category: Category) -> list[Sample]:
    """What the run may read of a category."""
    return category.test_samples() + (category.train_samples() if args.false_alarm_rate else [])


def calibrate_fusion(args: argparse.Namespace, category: Category, usad: USAD, checkpoints: Path) -> OperatingPoint:
    """Find the operating point on the held-out normal images and store it beside the checkpoints."""
    dataset = ImageDataset(held_out_samples(category, usad.branches), usad.image_size, "bicubic")
    loader = make_loader(args, dataset, "fusion held out", usad)
    point = find_operating_point(usad, checkpoints, loader, args.false_alarm_rate)
    if distributed.is_main_process():
        point.write(checkpoints)
    print(f"{category.name}: thresholds from {point.source}; in {checkpoints / 'usad.json'}")
    if point.shortfall:
        warn(point.shortfall)
    return point


if __name__ == "__main__":
    run(main, torchrun=True)
