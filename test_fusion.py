"""Fuse the three branches and report image AUROC, pixel AUROC and PRO.

python test_fusion.py                                    # saved_models/coal_ad on data/coal_ad
python test_fusion.py --models-dir trained_models --category my_belt --fusion standardized
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from datasets.mvtec import Category, ImageDataset, find_categories
from models import BRANCHES, USAD
from models.usad import FUSIONS
from utils.cli import Parser, add_data_flags, add_run_flags, choose_device, number, run
from utils.evaluate import claim_folder, evaluate, print_metrics, write_average
from utils.training import make_loader, open_category, settings_in_force


def main() -> None:
    args = parse_args()
    device = choose_device(args.device, args.precision)
    categories = [
        open_category(args.data_root, name) for name in find_categories(args.data_root, args.category)
    ]
    for category in categories:
        category.test_items()
        claim_folder(args.results_dir / category.name / USAD.name)
    metrics = {category.name: test(args, category, device) for category in categories}
    if len(metrics) > 1:
        average = write_average(args.results_dir / f"average_{USAD.name}.json", metrics)
        print(f"average of {len(metrics)} categories")
        print_metrics(USAD.name, average)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_flags(parser)
    parser.add_argument(
        "--models-dir", type=Path, default=Path("saved_models"), help="holds <category>/<branch>.safetensors"
    )
    group = parser.add_argument_group("fusion")
    group.add_argument("--fusion", choices=FUSIONS, default="paper", help="default: paper")
    group.add_argument("--lambda-obj", type=number(float, 0), help="factor of MACLU's score (default: 0.01)")
    group.add_argument(
        "--lambda-map", type=number(float, 0), help="factor of the fused map's maximum (default: 1)"
    )
    for branch in BRANCHES:
        group.add_argument(
            branch.weights_flag, metavar="FILE", help=f"where the weights of {branch.name} are now"
        )
    add_run_flags(parser)
    args = parser.parse_args()
    for flag, default in (("lambda_obj", 0.01), ("lambda_map", 1.0)):
        if getattr(args, flag) is None:
            setattr(args, flag, default)
        elif args.fusion == "standardized":
            parser.error(f"--{flag.replace('_', '-')} has no effect with --fusion standardized; leave it out")
    return args


def test(args: argparse.Namespace, category: Category, device: str) -> dict[str, Any]:
    """Load the category's three checkpoints, test their fusion and write its results."""
    usad = USAD.load(
        args.models_dir / category.name,
        device,
        args.precision,
        weights={
            branch.name: getattr(args, branch.weights_flag.removeprefix("--").replace("-", "_"))
            for branch in BRANCHES
        },
        score_weights={"ma_clu": args.lambda_obj},
        lambda_map=args.lambda_map,
        fusion=args.fusion,
    )
    if len({branch.training.get("files_digest") for branch in usad.branches} - {None}) > 1:
        print(
            f"warning: the branches of {category.name} were trained on different lists of files",
            file=sys.stderr,
        )
    dataset = ImageDataset(category.test_items(), usad.image_size, "bicubic")
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
        {"settings": settings_in_force(args, category), "branches": branches},
        images=not args.no_images,
        save_maps=args.save_maps,
    )
    print_metrics(usad.name, metrics)
    print(f"{category.name}: results in {folder}", flush=True)
    return metrics


if __name__ == "__main__":
    run(main)
