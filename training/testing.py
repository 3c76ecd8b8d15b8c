"""From the checkpoints of a category to the results of their fusion: the work of test_fusion.py."""

import argparse
from pathlib import Path
from typing import Any

import torch

from datasets.mvtec import Category, Sample
from evaluation.evaluate import average, average_path
from models.fusion.checkpoints import bit_depth_of, checkpoint_digests
from models.fusion.operating_point import FILE_NAME, OperatingPoint, find_operating_point
from models.fusion.usad import USAD
from training.categories import opened_categories
from training.options import data_settings, fusion_options, fusion_record, run_settings, weights_by_branch
from training.settings import RunSettings
from training.training import held_out_samples, test_loader, tested
from utils.command_line import warn
from utils.distributed import is_main_process
from utils.errors import InputError
from utils.gather import all_rows, one_per_machine_first, require_same


def test(args: argparse.Namespace) -> None:
    """Test the fusion of each category and write its results; `args` are the flags of test_fusion.py.

    With --false-alarm-rate a category without test images gets its thresholds alone.
    """
    run, data = run_settings(args), data_settings(args)
    folders = {name: args.models_dir / name for name in data.categories}
    depths = {name: bit_depth_of(folder) for name, folder in folders.items()}  # raises if a checkpoint is missing
    options = fusion_options(args, folders.values())
    average_file = average_path(data.results_dir, USAD.name)

    def samples_of(category: Category) -> list[Sample]:
        if not args.false_alarm_rate:
            return category.test_samples()
        return category.train_samples() + (category.test_samples() if category.has_tests else [])

    metrics = {}
    with opened_categories(data, samples_of, run.workers, depths, USAD.name) as categories:
        for category in categories:
            usad = fusion_of(args, category, run, options)
            if category.has_tests:
                metrics[category.name] = test_category(args, category, run, usad)
            else:
                print(f"{category.name}: no folder test, so there is nothing to test")
    average(USAD.name, average_file, metrics)


def fusion_of(args: argparse.Namespace, category: Category, run: RunSettings, options: dict[str, Any]) -> USAD:
    """The fusion of the category's checkpoints, with thresholds if a rate of false alarms is asked for."""
    checkpoints = args.models_dir / category.name
    digests, point = checkpoint_digests(checkpoints), OperatingPoint.read(checkpoints)
    require_same("checkpoints in --models-dir", digests.values)
    with one_per_machine_first():
        usad = USAD.load(checkpoints, run.device, run.precision, weights_by_branch(args), **options)
    if len({branch.frames for branch in usad.branches if branch.frames.known}) > 1:
        warn(f"the branches of {category.name} were trained on different lists of files")
    others = {branch.training.get("category", category.name) for branch in usad.branches} - {category.name}
    if others:
        warn(f"the checkpoints in {checkpoints} were trained on category {', '.join(sorted(map(str, others)))}")
    if args.false_alarm_rate:
        usad.set_operating_point(find_thresholds(usad, category, run, checkpoints, digests, args.false_alarm_rate))
    elif point and point.checkpoints != digests:
        warn(f"{checkpoints / FILE_NAME} was made for other checkpoints: no thresholds without --false-alarm-rate")
    elif point and point.fusion != usad.settings():
        warn(f"{checkpoints / FILE_NAME} is for another fusion, which predict.py goes by: {point.fusion}")
    return usad


def test_category(args: argparse.Namespace, category: Category, run: RunSettings, usad: USAD) -> dict[str, Any]:
    """Test the fusion on the category's test images; returns the figures."""
    settled = {**fusion_record(usad.settings()), "category": category.name}
    branches = {
        branch.name: {
            "backbone": branch.backbone.spec.to_dict(),
            **branch.settings(),
            "tiles": branch.tiles,
            "training": branch.training,
        }
        for branch in usad.branches
    }
    return tested(args, run, category, usad, settled, {"branches": branches})


def find_thresholds(
    usad: USAD,
    category: Category,
    run: RunSettings,
    checkpoints: Path,
    digests: dict[str, str],
    false_alarm_rate: float,
) -> OperatingPoint:
    """Find the operating point on the held-out normal images and store it beside the checkpoints.

    Raises InputError if these no longer have the `digests` from before the fusion was loaded.
    """
    samples = held_out_samples(category, usad.branches)
    found = [torch.zeros(0, 2, dtype=torch.float64)]
    for batch in test_loader(run, samples, usad, "held out"):
        part = usad.predict(batch["image"].to(usad.device, non_blocking=True))
        found.append(torch.stack([part.scores.double(), part.maps.amax((1, 2)).double()], 1).cpu())
    scores, peaks = all_rows(torch.cat(found)).numpy().T
    point = find_operating_point(scores, peaks.astype("float32"), false_alarm_rate, usad.settings(), digests)
    if is_main_process():
        if checkpoint_digests(checkpoints) != digests:
            raise InputError(f"the checkpoints in {checkpoints} have just been changed by another run; start again")
        point.write(checkpoints)
    print(f"{category.name}: thresholds from {point.source}; in {checkpoints / FILE_NAME}")
    if point.shortfall:
        warn(point.shortfall)
    return point
