"""How fast each stage is beside a plain reference; both are measured in turn, in one run.

python benchmarks/run.py --quick                               # whether it works: small networks and sizes
python benchmarks/run.py --category data/coal_ad               # the paper's sizes: an hour or two on a CPU
python benchmarks/run.py --stages coreset,neighbors --sizes coreset=1000,100000
python benchmarks/run.py --stages extract,fused --sizes extract=256 fused=256 --device cuda --precision bf16

Writes results.json and table.md to --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

import torch
from tqdm import tqdm

from benchmarks import stages
from benchmarks.bench import Bench, Row
from benchmarks.patchcore import patchcore
from training.options import PRECISIONS, choose_device
from utils.command_line import Parser, run, some_of
from utils.errors import InputError
from utils.files import write_json, write_text
from utils.machine import environment

STAGES = {  # sizes of a full and of a quick run
    "extract": (stages.extract, [50], [4]),
    "fused": (stages.fused, [50], [4]),
    "coreset": (stages.coreset, [1_000, 10_000, 100_000], [300]),
    "neighbors": (stages.neighbors, [1_000, 10_000, 100_000, 1_000_000], [100, 1_000]),
    "pixels": (stages.pixels, [10, 100], [3]),
    "fusion": (stages.fusion, [44], [4]),
    "patchcore": (patchcore, [18], [4]),
}


def main() -> None:
    args = parse_args()
    device = choose_device(args.device, args.precision)
    precision = "fp32" if args.precision == "auto" else args.precision
    work = args.out / "work" / ("quick" if args.quick else "full")  # files of the one are not the other's
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, precision, args.quick, work, args.category, args.anomalib_python)
    about = environment(device)
    machine = {"device": about["device"], "threads": torch.get_num_threads(), **about["versions"]}
    report: dict[str, Any] = {"product_gflop_per_second": bench.product_rates(precision), "machine": machine}
    rows, skipped = [], {}
    plan = [(name, size) for name in args.stages for size in args.sizes.get(name, STAGES[name][2 if args.quick else 1])]
    for name, size in (bar := tqdm(plan, unit="size", disable=None)):
        bar.set_description(f"{name} {size}")
        try:
            for row in STAGES[name][0](bench, size):
                rows.append(row)
                print(line(row), flush=True)
        except (RuntimeError, MemoryError) as error:  # the other stages need not be lost
            skipped[f"{name} {size}"] = " ".join(str(error).split())[:300]
            print(f"{name} {size}: not measured, {skipped[f'{name} {size}']}", flush=True)
        report |= {"rows": [{**row._asdict(), "ratio": row.ratio} for row in rows], "skipped": skipped}
        write_json(args.out / "results.json", report)
    write_text(args.out / "table.md", table(report, rows))
    print(f"table and figures in {args.out}")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    known = ",".join(STAGES)
    parser.add_argument("--stages", type=some_of(STAGES), default=list(STAGES), help=f"default: {known}")
    parser.add_argument(
        "--sizes", nargs="+", default=[], metavar="STAGE=SIZE,SIZE", help="images, patches, bank rows or maps"
    )
    parser.add_argument("--quick", action="store_true", help="small networks and sizes, a minute in all")
    parser.add_argument("--out", type=Path, default=Path("result/benchmarks"), help="default: result/benchmarks")
    parser.add_argument("--category", type=Path, help="a folder of real images in MVTec layout (default: drawn ones)")
    parser.add_argument("--anomalib-python", type=Path, help="an interpreter that has anomalib 2.7")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of our side (default: fp32)")
    args = parser.parse_args()
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


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    plain, ratio = (format(value, ".4g") if value else "-" for value in (row.reference, row.ratio))
    return f"| {row.stage} | {row.size} | {row.ours:.4g} | {plain} | {ratio} | {row.remark} |"


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
