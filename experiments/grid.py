"""From the flags of reproduce_tables.py to the tables of each category."""

import argparse
import dataclasses

from tqdm import tqdm

from datasets.mvtec import Category, Sample
from experiments import SWEEPS
from experiments.baselines import Baselines, comparison, find_baselines
from experiments.fusions import Fusion, ablation, sensitivity
from experiments.measurements import Measurements
from experiments.speed import speed
from experiments.table import computed, write_table
from experiments.variants import Variant
from models.fusion.checkpoints import bit_depth_of, checkpoint_paths
from models.fusion.paper import PaperProduct
from training.categories import opened_categories
from training.options import data_settings, fusion_options, fusion_record, record, run_settings, weights_by_branch
from training.settings import RunSettings
from utils.command_line import warn_once
from utils.errors import InputError
from utils.files import PROGRAM, mark_folder, write_json
from utils.machine import environment


def reproduce(args: argparse.Namespace) -> None:
    """Write the tables of each category; `args` are the flags of reproduce_tables.py."""
    run, data = run_settings(args), data_settings(args)
    folders = {name: args.models_dir / name for name in data.categories}
    options, fusions = fusion_options(args, folders.values()), {}
    calibrated = options["fusion"] != PaperProduct.name
    for name, folder in folders.items():
        paths = checkpoint_paths(folder)
        variants = {branch: Variant.of_checkpoint(branch, path, calibrated) for branch, path in paths.items()}
        fusion = Fusion(variants, options, tuple(variants)).settled()
        fusions[name] = [fusion.changed("seed", seed) for seed in args.seeds or []] or [fusion]
    rule = fusion_record(fusions[data.categories[0]][0].settings)
    for sweep in args.sweeps or []:
        if rule.get(sweep, 0) is None:
            raise InputError(f"--sweeps {sweep} has no effect with --fusion {rule['fusion']}; leave it out")
    baselines = find_baselines(args.baselines_python, args.baselines) if "comparison" in args.tables else None
    fits = args.seeds or {"comparison", "sensitivity"} & set(args.tables)

    def samples_of(category: Category) -> list[Sample]:
        return category.test_samples() + (category.train_samples() if fits else [])

    depths = {name: bit_depth_of(folder) for name, folder in folders.items()}
    with opened_categories(data, samples_of, run.workers, depths, "tables") as categories:
        for category in categories:
            make_tables(args, category, run, fusions[category.name], baselines)


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
    measurements = Measurements(folder / "measured", category, run, weights_by_branch(args))
    makers = {
        "comparison": lambda: comparison(measurements, fusions, baselines),
        "ablation": lambda: ablation(measurements, fusions),
        "sensitivity": lambda: sensitivity(measurements, fusions, args.sweeps or list(SWEEPS)),
        "speed": lambda: speed(measurements, fusions[0], args.models_dir / category.name),
    }
    tables = [makers[name]() for name in args.tables]
    labels = [sample.label for sample in measurements.samples]
    facts = {"category": category.name, "images": len(labels), "anomalous": sum(labels), "seeds": args.seeds}
    rows = [row for table in tables for section in table.sections for row in section.rows]
    with tqdm(total=len(rows), desc=category.name, unit="row", disable=None) as progress:
        for table in tables:
            progress.set_postfix_str(table.name)
            sections = []
            for section in table.sections:
                found = [computed(folder / "cells", row) for row in section.rows]
                sections.append((section, found))
                for empty in (row for row in found if not row["figures"]):
                    reason = empty["note"]
                    warn_once(reason, f"{category.name}: {table.name}: nothing for {empty['label']}: {reason}")
                progress.update(len(section.rows))
            write_table(folder, table, sections, facts)
            tqdm.write(f"{category.name}: {folder / table.name}.md")
    measurements.tidy()
    settings = {**dataclasses.asdict(run), **fusion_record(fusions[0].settings), "category": category.name}
    config = {"program": PROGRAM, "settings": record(args, **settings), "left_out": category.left_out}
    write_json(folder / "config.json", {**config, **environment(run.device)})
