"""From the flags of reproduce_tables.py to the tables of each category."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets.mvtec import Category, Sample
from experiments import SWEEPS
from experiments.baselines import Baselines, add_difference, comparison, find_baselines
from experiments.cells import CellStore, Unavailable
from experiments.fusions import Bench, Fusion, ablation, sensitivity
from experiments.measurements import Images, Measurements
from experiments.speed import speed
from experiments.variants import Variant
from experiments.writing import write_table
from models.fusion.checkpoints import checkpoint_paths
from training.categories import opened_categories
from training.options import data_settings, fusion_options, fusion_record, record, run_settings, weights_by_branch
from training.settings import RunSettings
from utils.errors import InputError
from utils.files import write_json
from utils.machine import environment
from utils.ownership import PROGRAM, mark_folder


def reproduce(args: argparse.Namespace) -> None:
    """Write the tables of each category; `args` are the flags of reproduce_tables.py."""
    run, data = run_settings(args), data_settings(args)
    folders = {name: args.models_dir / name for name in data.categories}
    options = fusion_options(args, folders.values())
    fusions = {name: fusions_by_seed(folder, options, args.seeds) for name, folder in folders.items()}
    settings = next(iter(fusions.values()))[0].settings
    check_sweeps(args.sweeps or [], settings)
    baselines = None
    if "comparison" in args.tables:
        weights = args.baselines_weights or like_patchcore(fusions[data.categories[0]][0])
        baselines = find_baselines(args.baselines_python, args.baselines, weights)
    fits = args.seeds or {"comparison", "sensitivity"} & set(args.tables)

    def samples_of(category: Category) -> list[Sample]:
        return category.test_samples() + (category.train_samples() if fits else [])

    with opened_categories(data, samples_of, run.workers, results="tables") as categories:
        for category in categories:
            make_tables(args, category, run, fusions[category.name], baselines)


def fusions_by_seed(folder: Path, options: dict[str, Any], seeds: list[int] | None) -> list[Fusion]:
    """The fusion of the checkpoints in `folder`, once for each seed; raises InputError if it cannot be built."""
    variants = {name: Variant.of_checkpoint(name, path) for name, path in checkpoint_paths(folder).items()}
    fusion = Fusion(variants, options, tuple(variants)).settled()
    return [fusion.with_variants(seed=seed) for seed in seeds] if seeds else [fusion]


def check_sweeps(sweeps: list[str], settings: dict[str, Any]) -> None:
    """Raise InputError for a sweep over a factor that the fusion does not have."""
    for sweep, setting in (("lambda_map", "lambda_map"), ("lambda_obj", "score_weights")):
        if sweep in sweeps and setting not in settings:
            raise InputError(f"--sweeps {sweep} has no effect with --fusion {settings['fusion']}; leave it out")


def like_patchcore(fusion: Fusion) -> list[str]:
    """The baselines' weights: untrained ones beside a PatchCore without pretrained weights, else pretrained ones."""
    return ["random" if fusion.variants["pc"].network.weights in ("random", "demo") else "pretrained"]


def make_tables(
    args: argparse.Namespace,
    category: Category,
    run: RunSettings,
    fusions: list[Fusion],
    baselines: Baselines | None,
) -> None:
    """Compute the cells of one category's tables, and write each table as soon as its cells are there."""
    folder = args.results_dir / category.name / "tables"
    mark_folder(folder)
    category.decoding = dataclasses.replace(category.decoding, bit_depth=fusions[0].variants["pc"].bit_depth)
    images = Images(category.test_samples())
    measurements = Measurements(folder / "measured", category, images, run, weights_by_branch(args))
    bench, store = Bench(measurements, run.batch_size), CellStore(folder / "cells")
    makers = {
        "comparison": lambda: comparison(bench, fusions, category, baselines),
        "ablation": lambda: ablation(bench, fusions),
        "sensitivity": lambda: sensitivity(bench, fusions, args.sweeps or list(SWEEPS)),
        "speed": lambda: speed(bench, fusions[0], args.models_dir / category.name),
    }
    tables = [makers[name]() for name in args.tables]
    cells = {cell.key: cell for table in tables for cell in table.cells()}
    facts = {
        "category": category.name,
        "images": len(images.samples),
        "anomalous": int(images.labels.sum()),
        "seeds": args.seeds,
    }
    with tqdm(total=len(cells), desc=category.name, unit="cell", disable=None) as progress:
        for table in tables:
            for key in dict.fromkeys(cell.key for cell in table.cells()):
                if key not in cells:
                    continue
                progress.set_postfix_str(table.name)
                with contextlib.suppress(Unavailable):  # the reason goes into the row
                    store.result(cells.pop(key))
                progress.update()
            if table.name == "comparison":
                add_difference(table, store)
            write_table(folder, table, store, facts)
            tqdm.write(f"{category.name}: {folder / table.name}.md")
    measurements.tidy()
    config = {
        "program": PROGRAM,
        "settings": record(
            args, **dataclasses.asdict(run), **fusion_record(fusions[0].settings), category=category.name
        ),
        "left_out": category.left_out,
        **environment(run.device),
    }
    write_json(folder / "config.json", config)
