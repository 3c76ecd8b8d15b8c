"""How fast each stage is beside a plain reference; both are measured in turn, in one run.

python benchmarks/run.py --quick                               # whether it works: small networks and sizes
python benchmarks/run.py --category data/coal_ad               # the paper's sizes: an hour or two on a CPU
python benchmarks/run.py --stages coreset,neighbors --sizes coreset=1000,100000
python benchmarks/run.py --stages extract,fused --sizes extract=256 fused=256 --device cuda --precision bf16

Writes results.json and table.md to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

import torch
from tqdm import tqdm

from benchmarks import coreset, fusion, inference, memory, neighbors, patchcore, pixel_metrics
from benchmarks.measure import Row
from benchmarks.settings import Settings
from training.options import PRECISIONS, choose_device
from utils.command_line import Parser, number, run
from utils.errors import InputError
from utils.files import write_json, write_text
from utils.machine import environment

# Stage, sizes of a full and of a quick run.
STAGES: dict[str, tuple[Callable[[Settings, int], Iterator[Row]], list[int], list[int]]] = {
    "extract": (inference.extract, [50], [4]),
    "fused": (inference.fused, [50], [4]),
    "coreset": (coreset.coreset, [1_000, 10_000, 100_000], [300]),
    "neighbors": (neighbors.neighbors, [1_000, 10_000, 100_000, 1_000_000], [100, 1_000]),
    "pixels": (pixel_metrics.pixels, [10, 100], [3]),
    "fusion": (fusion.fusion, [44], [4]),
    "patchcore": (patchcore.patchcore, [18], [4]),
    "memory": (memory.memory, [1_000], [100]),
}


def main() -> None:
    args = parse_args()
    device = choose_device(args.device, args.precision)
    settings = Settings(
        device,
        "fp32" if args.precision == "auto" else args.precision,
        args.batch_size or (32 if device.startswith("cuda") else 4),
        args.quick,
        args.out / "work" / ("quick" if args.quick else "full"),  # checkpoints of the one are not the other's
        args.category,
        args.anomalib_python,
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"product_gflop_per_second": settings.rates, "machine": machine(device)}
    rows, skipped = [], {}
    plan = [(name, size) for name in args.stages for size in args.sizes.get(name, STAGES[name][2 if args.quick else 1])]
    for name, size in (bar := tqdm(plan, unit="size", disable=None)):
        bar.set_description(f"{name} {size}")
        try:
            for row in STAGES[name][0](settings, size):
                rows.append(row)
                print(line(row), flush=True)
        except (RuntimeError, MemoryError) as error:  # the other stages need not be lost
            skipped[f"{name} {size}"] = " ".join(str(error).split())[:300]
            print(f"{name} {size}: not measured, {skipped[f'{name} {size}']}", flush=True)
        report |= {"rows": [{**dataclasses.asdict(row), "ratio": row.ratio} for row in rows], "skipped": skipped}
        write_json(args.out / "results.json", report)
    write_text(args.out / "table.md", table(report, rows))
    print(f"table and figures in {args.out}")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    known = ",".join(STAGES)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=f"default: {known}")
    parser.add_argument(
        "--sizes", nargs="+", default=[], metavar="STAGE=SIZE,SIZE", help="images, patches, bank rows or maps"
    )
    parser.add_argument("--quick", action="store_true", help="small networks and sizes, a minute in all")
    parser.add_argument("--out", type=Path, default=Path("result/benchmarks"), help="default: result/benchmarks")
    parser.add_argument("--category", type=Path, help="a folder of real images in MVTec layout (default: drawn ones)")
    parser.add_argument("--anomalib-python", type=Path, help="an interpreter that has anomalib 2.7")
    parser.add_argument("--batch-size", type=number(int, 1), help="default: 4 on a CPU, 32 on a GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of our side (default: fp32)")
    args = parser.parse_args()
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"--stages {name} is not one of {known}")
    if args.category is not None and not (args.category / "train").is_dir():
        parser.error(f"--category {args.category} is no folder in MVTec layout; give one that holds train and test")
    if args.anomalib_python is not None and not args.anomalib_python.is_file():
        parser.error(f"--anomalib-python {args.anomalib_python} is no file; give the interpreter of an environment")
    args.sizes = dict(sizes(text, args.stages) for text in args.sizes)
    args.out, args.category = args.out.absolute(), args.category and args.category.absolute()
    return args


def sizes(text: str, chosen: list[str]) -> tuple[str, list[int]]:
    """`coreset=1000,100000` -> ("coreset", [1000, 100000]); raises InputError for anything else."""
    name, _, values = text.partition("=")
    if name not in chosen or not all(value.isdecimal() and int(value) > 0 for value in values.split(",")):
        raise InputError(f"--sizes {text}: write STAGE=SIZE,SIZE with a stage that is run ({', '.join(chosen)})")
    return name, [int(value) for value in values.split(",")]


def machine(device: str) -> dict[str, Any]:
    """What every figure depends on."""
    about = environment(device)
    return {"device": about["device"], "threads": torch.get_num_threads(), **about["versions"]}


def remarks(row: Row) -> str:
    """What the reference is, how near it is, and what else is known of the row."""
    parts = [row.against, row.agreement]
    if "cpu_seconds" in row.details:
        parts.append("processor time {cpu_seconds:.1f} s against {reference_cpu_seconds:.1f} s".format(**row.details))
    if "share_of_product_rate" in row.details:
        parts.append(f"{row.details['share_of_product_rate']:.0%} of the product rate")
    return "; ".join(part for part in parts if part)


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    plain, ratio = (format(value, ".4g") if value else "-" for value in (row.reference, row.ratio))
    return f"| {row.stage} | {row.size:,} {row.unit} | {row.ours:.4g} | {plain} | {ratio} | {remarks(row)} |"


def table(report: dict[str, Any], rows: list[Row]) -> str:
    """The machine, all rows, and what was not measured, in Markdown."""
    words = [f"{key}: {value}" for key, value in report["machine"].items()]
    words += [f"{kernel}: {rate:.0f} GFLOP/s" for kernel, rate in report["product_gflop_per_second"].items()]
    head = [
        "| stage | size | ours, s | reference, s | ratio | reference and agreement |",
        "|---|---:|---:|---:|---:|---|",
    ]
    missing = [f"Not measured: {name} ({reason})" for name, reason in report["skipped"].items()]
    return "\n".join([", ".join(words), "", *head, *map(line, rows), "", *missing]).rstrip() + "\n"


if __name__ == "__main__":
    run(main)
