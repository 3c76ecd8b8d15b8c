"""How fast each stage is, over growing sizes, beside a plain reference; ratios are measured in one run.

python benchmarks/run.py --quick                               # small networks and sizes: whether it works
python benchmarks/run.py --images data/coal_ad/train/good      # the full sizes: an hour or two on a CPU
python benchmarks/run.py --stages coreset,neighbors --sizes coreset=1000,100000
python benchmarks/run.py --stages extract,fused --device cuda --precision bf16 --batch-size 32

Writes results.json, table.md and cost.png to --out.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

import torch
from tqdm import tqdm

from benchmarks import metric_stages, processes, stages
from benchmarks.measure import Row
from benchmarks.plot import plot
from benchmarks.settings import Settings
from training.options import PRECISIONS, choose_device
from utils.command_line import Parser, number, run
from utils.errors import InputError
from utils.files import write_json, write_text
from utils.machine import processor

# Stage, sizes of a full and of a quick run, what the size counts.
STAGES: dict[str, tuple[Callable[[Settings, int], Iterator[Row]], list[int], list[int]]] = {
    "extract": (stages.extract, [50, 200, 1000], [4]),
    "fused": (stages.fused, [50, 200, 1000], [4]),
    "coreset": (stages.coreset, [1_000, 10_000, 100_000], [300, 1_000]),
    "sample": (stages.sample, [60], [8]),
    "neighbors": (stages.neighbors, [1_000, 10_000, 100_000, 1_000_000], [100, 1_000]),
    "postprocess": (stages.postprocess, [140, 406, 1_022], [140]),
    "pro": (metric_stages.pro, [10, 100], [3]),
    "pixel_auroc": (metric_stages.pixel_auroc, [50, 200], [4]),
    "fusion": (processes.fusion, [44], [4]),
    "patchcore": (processes.patchcore, [18], [4]),
    "memory": (processes.memory, [1_000], [100]),
}


def main() -> None:
    args = parse_args()
    device = choose_device(args.device, args.precision)
    precision = "fp32" if args.precision == "auto" else args.precision
    settings = Settings(
        device,
        precision,
        args.batch_size or (32 if device.startswith("cuda") else 4),
        args.quick,
        args.images,
        args.reference_images,
        args.out / "work" / ("quick" if args.quick else "full"),  # checkpoints of the one are not the other's
        args.category,
        args.anomalib_python,
    )
    settings.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(device), "product_gflop_per_second": settings.rates, "rows": []}
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
    write_text(args.out / "table.md", table(report["machine"], report["product_gflop_per_second"], rows, skipped))
    if rows:
        plot(rows, args.out / "cost.png")
    print(f"table, figures and plot in {args.out}")


def parse_args() -> Any:
    parser = Parser(__doc__)
    known = ",".join(STAGES)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=f"default: {known}")
    parser.add_argument(
        "--sizes", nargs="+", default=[], metavar="STAGE=SIZE,SIZE", help="images, patches, bank rows, pixels or maps"
    )
    parser.add_argument("--quick", action="store_true", help="small networks and sizes, seconds in all")
    parser.add_argument("--out", type=Path, default=Path("result/benchmarks"), help="default: result/benchmarks")
    parser.add_argument("--images", type=Path, help="a folder of real images, for the coreset's real features")
    parser.add_argument("--category", type=Path, help="a folder in MVTec layout for the whole scripts (default: drawn)")
    parser.add_argument("--anomalib-python", type=Path, help="an interpreter that has anomalib 2.7")
    parser.add_argument(
        "--reference-images",
        type=number(int, 1),
        default=50,
        help="the published loop is timed on so many images at most (default: 50)",
    )
    parser.add_argument("--batch-size", type=number(int, 1), help="default: 4 on a CPU, 32 on a GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of our side (default: fp32)")
    args = parser.parse_args()
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"--stages {name} is not one of {known}")
    for path, flag in ((args.images, "--images"), (args.category, "--category")):
        if path is not None and not path.is_dir():
            parser.error(f"{flag} {path} is no folder")
    if args.images is not None and not stages.image_files(args.images):
        parser.error(f"--images {args.images} holds no images; give a folder that does, or leave it out")
    args.sizes = dict(sizes(text, args.stages) for text in args.sizes)
    args.out = args.out.absolute()
    return args


def sizes(text: str, chosen: list[str]) -> tuple[str, list[int]]:
    """`coreset=1000,100000` -> ("coreset", [1000, 100000]); raises InputError for anything else."""
    name, _, values = text.partition("=")
    if name not in chosen or not all(value.isdecimal() and int(value) > 0 for value in values.split(",")):
        raise InputError(f"--sizes {text}: write STAGE=SIZE,SIZE with a stage that is run ({', '.join(chosen)})")
    return name, [int(value) for value in values.split(",")]


def machine(device: str) -> dict[str, Any]:
    """What every figure depends on."""
    import timm

    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def line(row: Row) -> str:
    """One row in words."""
    ratio = f"{row.ratio:.2f} x faster than {row.against}" if row.ratio else f"against {row.against}"
    parts = [f"{row.stage}, {row.size:,} {row.unit}: {row.ours:.4g} s", ratio, row.agreement]
    if "cpu_seconds" in row.details:
        parts.append("processor time {cpu_seconds:.1f} s against {reference_cpu_seconds:.1f} s".format(**row.details))
    if "share_of_product_rate" in row.details:
        parts.append(f"{row.details['share_of_product_rate']:.0%} of the product rate")
    if "share_of_distances" in row.details:
        parts.append(f"{row.details['share_of_distances']:.1%} of the distances evaluated")
    return "; ".join(part for part in parts if part)


def table(about: dict[str, Any], product: dict[str, float], rows: list[Row], skipped: dict[str, str]) -> str:
    """The rows in Markdown."""
    words = [f"{key}: {value}" for key, value in about.items() if value is not None]
    words += [f"{kernel}: {rate:.0f} GFLOP/s" for kernel, rate in product.items()]
    lines = [", ".join(words), "", "| stage | size | ours, s | reference, s | ratio | what and how near |"]
    lines.append("|---|---:|---:|---:|---:|---|")
    for row in rows:
        cells = [row.stage, f"{row.size:,} {row.unit}", f"{row.ours:.4g}"]
        cells += [f"{row.reference:.4g}" if row.reference else "-", f"{row.ratio:.2f}" if row.ratio else "-"]
        lines.append("| " + " | ".join([*cells, "; ".join(line(row).split("; ")[1:])]) + " |")
    lines += ["", *(f"Not measured: {name} ({reason})" for name, reason in skipped.items())]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    run(main)
