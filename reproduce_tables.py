"""The paper's tables on your data: comparison with other methods, ablation, sensitivity, speed.

python reproduce_tables.py                                           # all four for saved_models/coal_ad
python reproduce_tables.py --category coal_demo --tables ablation,speed
python reproduce_tables.py --tables sensitivity --sweeps lambda_obj,lambda_map --seeds 1 2 3

Writes Markdown, CSV, JSON and plots to <results-dir>/<category>/tables/. Every finished cell is kept there: started
again, the script goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
from functools import partial
from pathlib import Path

from tqdm import tqdm

from datasets.mvtec import Category, Sample, find_categories
from datasets.unreadable import leave_out_unreadable, list_all_unreadable
from evaluation.evaluate import environment
from evaluation.result_files import claim_folder, mark_folder
from experiments.baselines import BASELINES, Baselines, add_difference, comparison, find_baselines
from experiments.cells import CellStore, Unavailable
from experiments.fusions import SWEEPS, Bench, Fusion, ablation, sensitivity
from experiments.measurements import Images, Measurements
from experiments.speed import speed
from experiments.variants import Variant
from experiments.writing import write_table
from models import BRANCHES
from models.fusion.usad import checkpoint_paths
from training.training import open_category, settings_in_force
from utils.command_line import (
    Parser,
    add_data_flags,
    add_fusion_flags,
    add_loading_flags,
    add_skip_flag,
    add_weights_flags,
    check_fusion,
    number,
    run,
    settle_fusion,
    settle_run,
    some_of,
    weights_by_branch,
)
from utils.errors import InputError
from utils.files import write_json
from utils.locks import folder_lock

TABLES = ("comparison", "ablation", "sensitivity", "speed")


def main() -> None:
    args = parse_args()
    settle_run(args)
    names = find_categories(args.data_root, args.category)
    settle_fusion(args, [args.models_dir / name for name in names])
    settle_sweeps(args)
    fusions = {name: fusions_by_seed(args, args.models_dir / name) for name in names}
    baselines = None
    if "comparison" in args.tables:
        weights = args.baselines_weights or like_patchcore(fusions[names[0]][0])
        baselines = find_baselines(args.baselines_python, args.baselines, weights)
    with contextlib.ExitStack() as locks:
        for name in names:
            claim_folder(args.results_dir / name / "tables")
            locks.enter_context(folder_lock(args.results_dir / name / "tables"))
        categories = [open_category(args.data_root, name) for name in names]
        with list_all_unreadable(categories, partial(samples_in_use, args), args.workers, args.skip_unreadable):
            for category in categories:
                if args.skip_unreadable:
                    leave_out_unreadable(category, samples_in_use(args, category), args.workers)
                category.test_samples()
            for category in categories:
                reproduce(args, category, fusions[category.name], baselines)


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_data_flags(parser)
    parser.add_argument(
        "--models-dir", type=Path, default=Path("saved_models"), help="holds <category>/<branch>.safetensors"
    )
    group = parser.add_argument_group("tables")
    group.add_argument("--tables", type=some_of(TABLES), default=list(TABLES), help=f"default: {','.join(TABLES)}")
    group.add_argument(
        "--seeds",
        type=number(int, 0, 2**32 - 1),
        nargs="+",
        help="mean ± standard deviation over these; branches that depend on the seed are fitted again (default: the "
        "checkpoints' own)",
    )
    group.add_argument("--sweeps", type=some_of(SWEEPS), help=f"of the sensitivity table (default: {','.join(SWEEPS)})")
    group = parser.add_argument_group("baselines (anomalib)")
    group.add_argument("--baselines", type=some_of(BASELINES), help=f"default: {','.join(BASELINES)}")
    group.add_argument(
        "--baselines-python", type=Path, metavar="PATH", help="a Python that has anomalib (default: .venv-baselines)"
    )
    group.add_argument(
        "--baselines-weights",
        nargs="+",
        metavar="W",
        help="pretrained (anomalib downloads them), random (untrained), or files of weights for PaDiM's resnet18 and "
        "PatchCore's wide_resnet50_2 (default: as PatchCore's checkpoint: random if that is, else pretrained)",
    )
    add_fusion_flags(parser)
    add_weights_flags(parser, BRANCHES)
    add_loading_flags(parser)
    add_skip_flag(parser)
    args = parser.parse_args()
    check_fusion(args)
    for flag, table in (
        ("sweeps", "sensitivity"),
        ("baselines", "comparison"),
        ("baselines_python", "comparison"),
        ("baselines_weights", "comparison"),
    ):
        if getattr(args, flag) is not None and table not in args.tables:
            parser.error(f"--{flag.replace('_', '-')} has no effect without the table {table}; leave it out")
    if args.seeds and args.tables == ["speed"]:
        parser.error("--seeds has no effect on the table speed alone; leave it out")
    args.seeds = args.seeds and list(dict.fromkeys(args.seeds))
    args.baselines = args.baselines or list(BASELINES)
    return args


def settle_sweeps(args: argparse.Namespace) -> None:
    """All sweeps where none are named; raises InputError for a named one that the fusion does not have."""
    factors = {"lambda_obj", "lambda_map"} & set(args.sweeps or ())
    if args.fusion == "standardized" and factors:
        raise InputError(f"--sweeps {min(factors)} has no effect with --fusion standardized; leave it out")
    args.sweeps = args.sweeps or list(SWEEPS)


def fusions_by_seed(args: argparse.Namespace, folder: Path) -> list[Fusion]:
    """The fusion of the checkpoints in `folder`, once for each seed; raises InputError where it cannot be."""
    variants = {branch.name: Variant.of_checkpoint(branch, path) for branch, path in checkpoint_paths(folder).items()}
    settings = {
        "score_weights": {"ma_clu": args.lambda_obj},
        "lambda_map": args.lambda_map,
        "fusion": args.fusion,
    }
    fusion = Fusion(variants, settings, tuple(variants))
    fusion.usad()  # raises where the settings do not suit the checkpoints
    return [fusion.with_variants(seed=seed) for seed in args.seeds] if args.seeds else [fusion]


def samples_in_use(args: argparse.Namespace, category: Category) -> list[Sample]:
    """What the run may read of a category."""
    fits = args.seeds or {"comparison", "sensitivity"} & set(args.tables)
    return category.test_samples() + (category.train_samples() if fits else [])


def like_patchcore(fusion: Fusion) -> list[str]:
    """The baselines' weights: untrained ones beside a PatchCore without pretrained weights, else pretrained ones."""
    return ["random" if fusion.variants["pc"].network.weights in ("random", "demo") else "pretrained"]


def reproduce(args: argparse.Namespace, category: Category, fusions: list[Fusion], baselines: Baselines | None) -> None:
    """Compute the cells of one category's tables and write each table as soon as its own are there."""
    folder = args.results_dir / category.name / "tables"
    mark_folder(folder)
    images = Images(category.test_samples())
    measurements = Measurements(folder / "measured", category, images, args, weights_by_branch(args, BRANCHES))
    bench, store = Bench(measurements, args.batch_size), CellStore(folder / "cells")
    makers = {
        "comparison": lambda: comparison(bench, fusions, category, baselines),
        "ablation": lambda: ablation(bench, fusions),
        "sensitivity": lambda: sensitivity(bench, fusions, args.sweeps),
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
    config = {"settings": settings_in_force(args, category), "left_out": category.left_out, **environment(args)}
    write_json(folder / "config.json", config)


if __name__ == "__main__":
    run(main)
