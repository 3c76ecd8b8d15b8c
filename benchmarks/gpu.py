"""One card in two minutes: checks, launches, and images a second of networks, search, fusion and the whole program.

python benchmarks/gpu.py                                  # on a GPU; writes results.json and gpu.csv to --out
python benchmarks/gpu.py --quick --device cpu             # whether it works: small networks, seconds
python benchmarks/gpu.py --stages product,networks --batches 32,128

Networks are untrained, branches fitted on noise; every rate is taken in this one run, frames lying in memory but for
the stage `program`.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

started = time.perf_counter()  # imports count

# ruff: noqa: E402
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import reference
from benchmarks.card import SEED, Bench, frames
from models import USAD
from models.branches.neighbors import NearestNeighbors
from models.networks.cuda import FusedConv2d
from utils.gpu import CapturedPasses, ReadBack

IMPORTS = time.perf_counter() - started
FEATURE_ERROR = 0.03  # of bf16, of the root mean square feature
AUROC_ERROR = 0.002
VISIBLE = 0.8, 0.97  # AUROC of anomalies that untrained networks neither miss nor always see


def product(bench: Bench) -> None:
    """What the card can do at most: products of matrices of random numbers, and bytes copied."""
    side = 512 if bench.args.quick else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        bench.say(**{f"product_tflops_{name}": 2 * side**3 / bench.seconds(lambda a=a, b=b: a @ b) / 1e12})
    source = torch.randn(side, side, 4, device=bench.device)
    target = torch.empty_like(source)
    bench.say(copy_gb_per_second=2 * 4 * source.numel() / bench.seconds(lambda: target.copy_(source)) / 1e9)


def build(bench: Bench) -> None:
    """Seconds until the branches stand, and of their first passes: as usual, captured, replayed."""
    batch = bench.args.batches[0]
    for precision in ("fp32", "bf16"):
        start = time.perf_counter()
        usad = bench.usad(precision)
        bench.wait()
        bench.say(**{f"build_seconds_{precision}": time.perf_counter() - start})
        images = bench.images(batch, usad.image_size)
        passes = [bench.round(lambda usad=usad, images=images: usad.predict(images), 1) for _ in range(4)]
        bench.say(**{f"first_passes_seconds_{precision}": [round(took, 3) for took in passes]})


def checks(bench: Bench) -> None:
    """bf16 against fp32, and this device against the CPU, in features, scores and AUROC."""
    exact, rough = bench.usad("fp32"), bench.usad("bf16")
    for one, other in zip(exact.branches, rough.branches, strict=True):
        images = frames(4, one.image_size, SEED).to(bench.device)
        for number, (a, b) in enumerate(zip(one.backbone(images), other.backbone(images), strict=True)):
            error = float((a - b).square().mean().sqrt() / a.square().mean().sqrt())
            bench.say(**{f"feature_error_bf16_{one.name}_{number}": error})
            assert error < FEATURE_ERROR
        cpu = bench.backbone(one.name, "fp32", "cpu")(images[:1].cpu())
        error = max(
            float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(one.backbone(images[:1]), cpu, strict=True)
        )
        bench.say(**{f"feature_error_against_cpu_{one.name}": error})
        assert error < 1e-3
    compare_aurocs(bench, exact, rough)
    if bench.cuda:
        conv = torch.nn.Conv2d(64, 64, 3, padding=1, device=bench.device, dtype=torch.bfloat16)
        image = torch.full((1, 64, 8, 8), torch.nan, device=bench.device, dtype=torch.bfloat16)
        fused = FusedConv2d(conv.requires_grad_(False).to(memory_format=torch.channels_last))
        bench.say(fused_relu_keeps_nan=bool(fused(image).isnan().all()))


def compare_aurocs(bench: Bench, exact: USAD, rough: USAD) -> None:
    """The same frames in both precisions. How strong their spots are is decided in fp32 alone."""
    from sklearn.metrics import roc_auc_score

    def scores(usad: USAD, spot: float, count: int) -> list[float]:
        found = []
        for start in range(0, count, 32):
            batch = frames(
                min(32, count - start), usad.image_size, start + (2000 if spot else 1000), bench.device, spot
            )
            found += usad.predict(batch).scores.tolist()
        return found

    def auroc_of(usad: USAD, spot: float, count: int) -> tuple[float, list[float]]:
        found = scores(usad, 0.0, count) + scores(usad, spot, count)
        return float(roc_auc_score([0] * count + [1] * count, found)), found

    for spot in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        if VISIBLE[0] < auroc_of(exact, spot, 32)[0] < VISIBLE[1]:
            break
    count = 32 if bench.args.quick else 512
    (fp32, expected), (bf16, found) = (auroc_of(usad, spot, count) for usad in (exact, rough))
    far = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    bench.say(spot=spot, images=2 * count, score_error_bf16=far, auroc_fp32=fp32, auroc_bf16=bf16)
    assert bench.args.quick or abs(fp32 - bf16) <= AUROC_ERROR  # of few images, one pair weighs more


def networks(bench: Bench) -> None:
    """Each network alone: as the program runs it."""
    for batch in bench.args.batches:
        for branch in bench.usad("bf16").branches:
            images = bench.images(batch, branch.image_size)
            took, peak = bench.peak(lambda branch=branch, images=images: branch.backbone(images))
            bench.rate(bench.networks[branch.name][0], branch.image_size, batch, took, bench.gflop(branch.name), peak)


def fused(bench: Bench) -> None:
    """Three branches and their fusion, fused maps and scores read back; and each branch's score alone."""
    usad = bench.usad("bf16")
    for batch in bench.args.batches:
        images = bench.images(batch, usad.image_size)
        took, peak = bench.peak(reading_back(bench, usad, images))
        assert not bench.cuda or usad.passes.obstacle is None, usad.passes.obstacle
        bench.rate("fused inference", usad.image_size, batch, took, sum(map(bench.gflop, bench.networks)), peak)
        for branch in usad.branches:
            features = branch.extract(bench.images(batch, branch.image_size))
            flat = CapturedPasses(lambda _, branch=branch, features=features: branch.score(features))
            score = bench.seconds(lambda flat=flat, images=images: flat(images[:, 0, 0]), 0.1)
            bench.say(**{f"score_ms_{branch.name}_{batch}": 1e3 * score / batch})
    images = bench.images(bench.args.batches[0], usad.image_size)
    plain = USAD(usad.branches)
    plain.passes = plain._predict_parts
    took = bench.seconds(reading_back(bench, plain, images))
    bench.say(fused_ms_networks_captured=1e3 * took / len(images))
    with mock.patch("models.fusion.usad.side_by_side", lambda works, device: [work() for work in works]):
        took = bench.seconds(reading_back(bench, USAD(usad.branches), images))
    bench.say(fused_ms_on_one_stream=1e3 * took / len(images))


def reading_back(bench: Bench, usad: USAD, images: Tensor) -> Callable[[], None]:
    """A call computes a batch and waits for the results of the one before it, as the program does."""
    before: list[ReadBack] = []

    def work() -> None:
        part = usad.predict(images)
        if bench.cuda:
            before.append(ReadBack((part.scores, part.maps), bench.device))
        if len(before) > 1:
            before.pop(0).wait()

    return work


def launches(bench: Bench) -> None:
    """What a batch asks of the device: launches and waits, and the kernels that take longest."""
    usad, batch = bench.usad("bf16"), bench.args.batches[0]
    images = bench.images(batch, usad.image_size)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
    for _ in range(3):
        usad.predict(images)
    bench.wait()
    with profile(activities=activities) as profiler:
        usad.predict(images)
        bench.wait()
    events = profiler.key_averages()
    bench.say(launches=json.dumps({event.key: event.count for event in events if event.key.startswith("cuda")}))
    key = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    for event in sorted(events, key=lambda event: -getattr(event, key))[:40]:
        if getattr(event, key):
            print(f"    {getattr(event, key) / 1e3:8.3f} ms {event.count:4d} x {event.key[:120]}")


def published(bench: Bench) -> None:
    """The published loop: one image at a time, whole networks, float32, OpenCV and SciPy."""
    usad = bench.usad("fp32")
    nets = {}
    for name, (network, size) in bench.networks.items():
        with mock.patch.object(reference, "random_state_dict", lambda make, seed, n=network: dict(bench.state(n))):
            make = reference.untrained_resnet if name == "pc" else reference.untrained_vit
            nets[name] = make(network, *(() if name == "pc" else (size,)), SEED).to(bench.device)
    states = {branch.name: branch.state() for branch in usad.branches}
    loop = reference.PublishedLoop(nets, states, {branch.name: branch.image_size for branch in usad.branches})
    images = bench.images(8, usad.image_size)
    for image in images[:2]:
        expected = loop(image[None])["fusion"][0]
    error = abs(float(usad.predict(images[1:2]).scores) / expected - 1)
    bench.say(score_error_against_published=error)
    assert error < 1e-3
    took = bench.round(lambda: [loop(image[None]) for image in images], 1) / len(images)
    bench.say(published_loop_ms_per_image=1e3 * took)


def search(bench: Bench) -> None:
    """PatchCore's search: ms an image of 900 patches of width 1536, against a whole matrix of distances."""
    queries = torch.randn(900 * 32 if bench.cuda else 900, 1536, device=bench.device)
    for rows in (144, 1000) if bench.args.quick else (144, 10_000, 100_000):
        bank = NearestNeighbors(torch.randn(rows, 1536, device=bench.device))
        ours = bench.seconds(lambda bank=bank: bank.search(queries, 1), 0.1)
        few = queries[:900]
        whole = bench.seconds(lambda bank=bank, few=few: torch.cdist(few, bank.rows).min(1), 0.1)
        bench.say(**{f"search_ms_{rows}": 1e3 * ours * 900 / len(queries), f"cdist_ms_{rows}": 1e3 * whole})


def program(bench: Bench) -> None:
    """test_fusion.py --no-images as a process on 150 frames of 512 px from disk, and what its imports cost."""
    import cv2
    import numpy as np

    bench.usad("fp32")  # writes the checkpoints
    root = bench.args.out.absolute() / "program"
    count, side = (6, 64) if bench.args.quick else (150, 512)
    for index in range(count):
        strange = index % 3 == 0
        kind = "rope" if strange else "good"
        pixels = (
            frames(1, side, index, spot=2.0 * strange)[0].permute(1, 2, 0).mul(40).add(110).clamp(0, 255).byte().numpy()
        )
        files = {root / "data" / "belt" / "test" / kind / f"{index:03d}.png": pixels}
        if strange:
            mask = np.zeros((side, side), np.uint8)
            mask[: side // 6, : side // 6] = 255
            files[root / "data" / "belt" / "ground_truth" / kind / f"{index:03d}_mask.png"] = mask
        for path, picture in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), picture)
    (root / "data" / "belt" / "train" / "good").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(root / "data" / "belt" / "train" / "good" / "0.png"), pixels)
    here = Path(__file__).resolve().parents[1]
    command = ["test_fusion.py", "--no-images", "--category", "belt", "--device", str(bench.device)]
    for flag, folder in (("--data-root", "data"), ("--models-dir", "models"), ("--results-dir", "result")):
        command += [flag, str(root / folder)]
    command += ["--precision", "bf16"]
    for turn, options in (("first", []), ("second", []), ("with_imports_timed", ["-X", "importtime"])):
        start = time.perf_counter()
        finished = subprocess.run([sys.executable, *options, *command], cwd=here, check=True, capture_output=True)
        bench.say(**{f"test_fusion_seconds_{turn}": time.perf_counter() - start})
        config = json.loads((root / "result" / "belt" / "fusion" / "config.json").read_text())
        bench.say(**{f"test_fusion_stages_{turn}": json.dumps(config["seconds"])})
    lines = re.findall(r"import time: +\d+ \| +(\d+) \| +(\S+)", finished.stderr.decode())
    bench.say(**{f"import_seconds_{name}": int(took) / 1e6 for took, name in lines if name in IMPORTED})


IMPORTED = ("torch", "torch._dynamo", "torchvision", "timm", "sklearn", "cv2", "scipy", "tqdm", "evaluation.evaluate")
STAGES = {
    stage.__name__: stage for stage in (product, build, networks, fused, published, launches, checks, search, program)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=",".join(STAGES))
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[32, 128])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small networks and sizes")
    parser.add_argument("--seconds", type=float, default=170, help="no stage begins later than this")
    parser.add_argument("--out", type=Path, default=Path("result/gpu"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench, failed = Bench(args, started), []
    bench.say(
        imports_seconds=IMPORTS, device=torch.cuda.get_device_name() if bench.cuda else "cpu", torch=torch.__version__
    )
    for name in args.stages:
        if time.perf_counter() - started > args.seconds:
            bench.say(**{f"stage {name}": "not run, out of time"})
            continue
        try:
            STAGES[name](bench)
        except Exception:  # the other stages need not be lost
            failed.append(name)
            traceback.print_exc()
        (args.out / "results.json").write_text(json.dumps(bench.found, indent=1))
    report(bench, failed)
    sys.exit(bool(failed))


def report(bench: Bench, failed: list[str]) -> None:
    """The table, on the screen and as CSV, and the ratios that matter."""
    if bench.rows:
        with (bench.args.out / "gpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(bench.rows[0]))
            writer.writeheader()
            writer.writerows(bench.rows)
    print(f"\n{'model':26}{'batch':>6}{'images/s':>10}{'ms':>8}{'TFLOP/s':>9}{'share':>7}{'MB':>8}")
    by_model: dict[tuple[str, int], dict[str, Any]] = {}
    for row in bench.rows:
        by_model[row["model"], row["batch"]] = row
        figures = f"{row['images_per_second']:10}{row['ms_per_image']:8}{row['tflops']:9}"
        print(
            f"{row['model']:26}{row['batch']:6}{figures}{row['share_of_product_rate']:7.1%}{row['peak_memory_mb']:8.0f}"
        )
    for batch in bench.args.batches:
        whole = by_model.get(("fused inference", batch))
        bare = [by_model.get((network, batch)) for network, _ in bench.networks.values()]
        if whole and all(bare):
            alone = sum(row["ms_per_image"] for row in bare)
            print(f"batch {batch}: {alone / whole['ms_per_image']:.1%} of the bare networks' combined rate", end="")
            if loop := bench.found.get("published_loop_ms_per_image"):
                print(f", {loop / whole['ms_per_image']:.1f} x the published loop", end="")
            print()
    print(f"failed: {', '.join(failed) or 'nothing'}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
