"""How fast each stage is beside a plain reference; both are measured in turn, in one run.

python benchmarks/run.py --quick                               # whether it works: small networks and sizes
python benchmarks/run.py                                       # the paper's sizes: an hour or two on a CPU
python benchmarks/run.py --stages coreset,neighbors --sizes coreset=1000,100000

Prints a table, and writes table.csv and results.json to --out.
"""

import argparse
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import reference
from benchmarks.bench import SEED, Bench, Pair, noise
from models import BRANCHES
from models.branches.coreset import greedy_k_center
from models.branches.neighbors import NearestNeighbors, load_faiss
from models.networks import PRECISIONS
from training.options import choose_device
from utils.command_line import Parser, run, some_of
from utils.errors import InputError
from utils.files import write_csv, write_json
from utils.gpu import ReadBack
from utils.machine import environment

MATRIX_BYTES = 3e9  # of distances and bank, up to which the whole matrix is computed
COLUMNS = ("stage", "size", "ours", "reference", "ratio", "per_second", "tflops", "share", "memory_mb", "remark")
Row = dict[str, Any]  # by column; seconds of ours and of the reference


def extract(bench: Bench, count: int) -> Iterator[Row]:
    """Each network in batches, cut after its last layer in use, against the whole one, an image at a time in fp32."""
    for branch in BRANCHES.values():
        spec = bench.spec(branch)
        backbone, net = bench.backbone(branch), reference.whole_network(spec).to(bench.device)
        images = noise(count, spec.image_size, SEED, bench.device)
        features = reference.layer_maps if branch.backbone_kind == "maps" else reference.vit_tokens

        def ours(backbone=backbone, images=images) -> Tensor:
            return [backbone(batch) for batch in images.split(bench.batch_size)][-1][-1][-1]

        def plain(net=net, images=images, features=features) -> Any:
            return [features(net, image[None]) for image in images][-1][1]

        pair = bench.pair(ours, plain)
        near = difference(pair.found, torch.as_tensor(pair.expected).squeeze(0))
        remark = f"whole network, one image at a time, fp32; largest difference {near:.1e} of the largest value"
        yield row(f"extract {spec.name}", bench, count, "images", pair, remark, bench.gflop(branch))


def fused(bench: Bench, count: int) -> Iterator[Row]:
    """All branches and their fusion, fitted on noise, against the published loop, which knows three branches."""
    usad, loop = bench.usad(bench.precision), None
    if set(BRANCHES) == reference.BRANCHES:
        loop = reference.PublishedLoop.load(bench.checkpoints, bench.device)
    images = noise(count, usad.image_size, 1, bench.device)
    on_their_way: deque[ReadBack] = deque()

    def ours() -> float:
        for batch in images.split(bench.batch_size):
            found = usad.predict(batch)
            if bench.cuda:  # results come back while the next batch is computed, as in a test
                on_their_way.append(ReadBack(found, usad.device))
                if len(on_their_way) > 1:
                    found = on_their_way.popleft().wait()
        return float(found.scores[-1])

    def plain() -> float:
        return [loop(image[None])["fusion"][0] for image in images][-1]

    pair = bench.pair(ours, plain if loop else None)
    remark = f"published loop, fp32; score within {abs(pair.found / pair.expected - 1):.1e}" if loop else ""
    yield row("fused inference", bench, count, "images", pair, remark, sum(map(bench.gflop, BRANCHES.values())))


def coreset(bench: Bench, count: int) -> Iterator[Row]:
    """1 % of `count` patches of noise, as wide as PatchCore's projection."""
    patches = torch.randn(count, 64 if bench.quick else 512, generator=torch.Generator().manual_seed(SEED))
    patches, size = patches.to(bench.device), max(count // 100, 2)
    pair = bench.pair(lambda: greedy_k_center(patches, size, progress=False), lambda: reference.sampled(patches, size))
    equal = sum(a == b for a, b in zip(pair.found.tolist(), pair.expected, strict=True))
    remark = f"a difference for each centre; {equal} of {size} indices equal"
    yield row("coreset", bench, count, "patches", pair, remark)


def neighbors(bench: Bench, count: int) -> Iterator[Row]:
    """The nearest of a bank's `count` rows to one image's patches: beside `torch.cdist`, and faiss if there is one."""
    width, queries = (64, 50) if bench.quick else (1536, 900)
    generator = torch.Generator().manual_seed(SEED)
    bank = torch.randn(count, width, generator=generator).to(bench.device)
    patches, ours = torch.randn(queries, width, generator=generator).to(bench.device), NearestNeighbors(bank)
    ours.faiss = None
    fits = 4 * count * (queries + width) < MATRIX_BYTES
    sides = {"torch.cdist whole, minimum": (lambda: reference.nearest(patches, bank)[0]) if fits else None}
    if load_faiss():
        import faiss.contrib.torch_utils  # lets it take torch's tensors

        knn = partial(faiss.knn_gpu, faiss.StandardGpuResources()) if bank.is_cuda else faiss.knn
        sides["faiss.knn"] = lambda: knn(patches, bank, 1)[0][:, 0].clamp(min=0).sqrt()
    for against, plain in sides.items():
        pair = bench.pair(lambda: ours.search(patches, 1)[0][:, 0], plain)
        near = f"; distances within {difference(pair.found, pair.expected):.1e}" if plain else ""
        yield row("neighbours", bench, count, "bank rows", pair, against + near)


def row(stage: str, bench: Bench, count: int, unit: str, pair: Pair, remark: str, gflop: float | None = None) -> Row:
    """A row of the table, for `count` of `unit`; with the 10^9 operations of each also the rate of these."""
    found = {
        "stage": f"{stage}, {bench.precision}",
        "size": f"{count} {unit}",
        "ours": pair.ours,
        "reference": pair.plain,
        "ratio": pair.plain and pair.plain / pair.ours,
        "per_second": count / pair.ours,
        "memory_mb": pair.memory,
        "remark": remark,
    }
    if gflop:
        rate = gflop * count / pair.ours
        found |= {"tflops": rate / 1e3, "share": rate / bench.product_rate(bench.precision)}
    return found


def difference(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    expected = expected.to(ours.device)
    return float((ours - expected).abs().max() / expected.abs().max())


Stage = tuple[Callable[[Bench, int], Iterator[Row]], list[int], list[int]]  # with sizes of a full and of a quick run
STAGES: dict[str, Stage] = {
    "extract": (extract, [50], [4]),
    "fused": (fused, [50], [4]),
    "coreset": (coreset, [1_000, 10_000, 100_000], [300]),
    "neighbors": (neighbors, [1_000, 10_000, 100_000, 1_000_000], [100, 1_000]),
}


def measure(stages: dict[str, Stage], args: argparse.Namespace, bench: Bench) -> None:
    """Run the stages that `args` names, and write the table after each."""
    about, rows, skipped = environment(bench.device), [], {}
    machine = {"device": about["device"], "threads": torch.get_num_threads(), **about["versions"]}
    report = {"machine": machine, "product_gflop_per_second": bench.product_rate(bench.precision)}
    report |= {"rows": rows, "skipped": skipped}
    usual = {name: quick if bench.quick else full for name, (_, full, quick) in stages.items()} | args.sizes
    plan = [(name, size) for name in args.stages for size in usual[name]]
    print(line(dict(zip(COLUMNS, COLUMNS, strict=True))), "|---" * len(COLUMNS) + "|", sep="\n")
    for name, size in tqdm(plan, unit="size", disable=None):
        try:
            for found in stages[name][0](bench, size):
                rows.append(found)
                print(line(found), flush=True)
        except (RuntimeError, MemoryError) as error:  # the other stages need not be lost
            skipped[f"{name} {size}"] = " ".join(str(error).split())[:300]
            print(f"{name} {size}: not measured, {skipped[f'{name} {size}']}", flush=True)
        write_json(args.out / "results.json", report)
    write_csv(args.out / "table.csv", [COLUMNS, *([found.get(column) for column in COLUMNS] for found in rows)])
    print(f"figures in {args.out}")


def line(found: Row) -> str:
    """A row of the table in Markdown."""
    cells = (found.get(column) for column in COLUMNS)
    texts = (format(cell, ".4g") if isinstance(cell, float) else str("-" if cell is None else cell) for cell in cells)
    return f"| {' | '.join(texts)} |"


def parse_args(description: str, stages: dict[str, Stage], device: str, precision: str, out: str) -> argparse.Namespace:
    """The flags, with these defaults."""
    parser = Parser(description)
    parser.add_argument("--stages", type=some_of(stages), default=list(stages), help=f"default: {','.join(stages)}")
    text = "images, patches or bank rows"
    parser.add_argument("--sizes", nargs="+", default=[], metavar="STAGE=SIZE,SIZE", help=text)
    parser.add_argument("--quick", action="store_true", help="small networks and sizes, a minute in all")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"default: {out}")
    parser.add_argument("--device", default=device, help=f"auto, cpu, cuda (default: {device})")
    parser.add_argument("--precision", choices=PRECISIONS[1:], default=precision, help=f"of our side ({precision})")
    args = parser.parse_args()
    args.device = choose_device(args.device, args.precision)
    given, args.sizes = args.sizes, {}
    for text in given:
        name, _, sizes = text.partition("=")
        if name not in args.stages or not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*)*", sizes):
            stages = ", ".join(args.stages)
            raise InputError(f"--sizes {text}: write STAGE=SIZE,SIZE with a stage that is run ({stages})")
        args.sizes[name] = [int(size) for size in sizes.split(",")]
    return args


def main() -> None:
    args = parse_args(__doc__, STAGES, "auto", "fp32", "result/benchmarks")
    measure(STAGES, args, Bench(args.device, args.precision, args.quick, args.out))


if __name__ == "__main__":
    run(main)
