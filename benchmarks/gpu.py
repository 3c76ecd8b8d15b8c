"""One card in a few minutes: rates of networks and fusion in half precision, its error, launches, the whole program.

python benchmarks/gpu.py                                  # on a GPU
python benchmarks/gpu.py --quick --device cpu             # whether it works: small networks, seconds
python benchmarks/gpu.py --stages extract,fused --sizes extract=32,128 fused=32,128

Prints a table, and writes table.csv and results.json to --out. Networks are untrained, branches fitted on noise; every
rate is taken in this one run, frames lying in memory but for the stage `program`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

from sklearn.metrics import roc_auc_score
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import Bench, noise
from benchmarks.run import Row, extract, fused, measure, neighbors, parse_args
from models import USAD
from utils.command_line import run
from utils.processes import run_python

VISIBLE = 0.8, 0.97  # AUROC of anomalies that untrained networks neither miss nor always see


def launches(bench: Bench, count: int) -> Iterator[Row]:
    """How often a batch of the fusion calls CUDA, by call."""
    usad = bench.usad(bench.precision)
    images = noise(count, usad.image_size, 23, bench.device)
    for _ in range(3):
        usad.predict(images)
    bench.wait()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
    with profile(activities=activities, acc_events=True) as profiler:
        usad.predict(images)
        bench.wait()
    calls = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("cuda")}
    yield {"stage": "launches", "size": f"{count} images", "remark": json.dumps(calls)}


def precision(bench: Bench, count: int) -> Iterator[Row]:
    """Scores and AUROC against fp32 on the same frames, half with a spot; how strong it is, is decided in fp32."""

    def auroc_of(usad: USAD, spot: float, count: int) -> tuple[float, list[float]]:
        found = []
        for first, strength in ((1000, 0.0), (2000, spot)):
            for seed in range(first, first + count, 32):
                found += usad.predict(noise(32, usad.image_size, seed, bench.device, strength)).scores.tolist()
        return float(roc_auc_score([0] * (len(found) // 2) + [1] * (len(found) // 2), found)), found

    exact, rough = bench.usad("fp32"), bench.usad(bench.precision)
    for spot in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        if VISIBLE[0] < auroc_of(exact, spot, 32)[0] < VISIBLE[1]:
            break
    (fp32, expected), (half, found) = (auroc_of(usad, spot, count // 2) for usad in (exact, rough))
    far = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    remark = f"scores within {far:.1e} of fp32; AUROC {half:.4f}, fp32 {fp32:.4f}"
    yield {"stage": f"precision, {bench.precision}", "size": f"{count} images", "remark": remark}


def program(bench: Bench, count: int) -> Iterator[Row]:
    """test_fusion.py --no-images as a process on drawn frames of 512 px from disk, and what its imports cost."""
    place = ["--data-root", bench.work / "data", "--category", "belt"]
    counts = ["--train", 1, "--good", count // 2, "--anomalous", count // 2, "--size", 64 if bench.quick else 512]
    run_python(["make_demo_data.py", *place, *counts])
    flags = [*place, "--models-dir", bench.checkpoints.parent, "--results-dir", bench.work / "result", "--no-images"]
    flags += ["--device", bench.device, "--precision", bench.precision]
    seconds = min(run_python(["test_fusion.py", *flags]) for _ in range(2))  # the first warms the file cache
    imports = run_python(["-c", "import torch, torchvision, timm"])
    config = json.loads((bench.work / "result/belt/fusion/config.json").read_text(encoding="utf-8"))
    remark = f"imports {imports:.1f} s; stages {json.dumps(config['seconds'])}"
    yield {"stage": "test_fusion.py, whole process", "size": f"{count} images", "ours": seconds, "remark": remark}


STAGES = {
    "extract": (extract, [32, 128], [4]),
    "fused": (fused, [32, 128], [4]),
    "neighbors": (neighbors, [144, 10_000, 100_000], [144]),
    "launches": (launches, [32], [4]),
    "precision": (precision, [1024], [64]),
    "program": (program, [150], [6]),
}


def main() -> None:
    args = parse_args(__doc__, STAGES, "cuda", "bf16", "result/gpu")
    bench = Bench(args.device, args.precision, args.quick, args.out)
    bench.batch_size = 128  # the sizes of `extract` and `fused` are batches
    measure(STAGES, args, bench)


if __name__ == "__main__":
    run(main)
