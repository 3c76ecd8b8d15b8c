"""One card in four minutes: checks, launches, and images a second of networks, search and fused inference.

python benchmarks/gpu.py                                  # on a GPU; writes results.json and gpu.csv to --out
python benchmarks/gpu.py --quick --device cpu             # whether it works: small networks, seconds
python benchmarks/gpu.py --stages product,networks --batches 32,128

Networks are untrained, branches fitted on noise, frames lie in memory; every rate is taken in this one run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

started = time.perf_counter()  # imports count

# ruff: noqa: E402
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models import BRANCHES, USAD
from models.branches.neighbors import NearestNeighbors
from models.networks import backbones, libraries
from models.networks.backbones import Backbone, BackboneSpec, build_backbone
from models.networks.cuda import CapturedPasses, FusedConv2d

IMPORTS = time.perf_counter() - started
SEED = 22
PAPER = {
    "ma_clu": ("vit_small_patch14_dinov2", 350),
    "ma2patch": ("vit_base_patch14_dinov2", 406),
    "pc": ("wide_resnet50_2", 238),
}
SMALL = {"ma_clu": ("test_vit", 64), "ma2patch": ("test_vit", 96), "pc": ("resnet18", 64)}
FEATURE_ERROR = 0.03  # of bf16, of the root mean square feature
AUROC_ERROR = 0.002


class Bench:
    """The flags, what is measured again and again, and what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = args.device
        self.networks = SMALL if args.quick else PAPER
        self.cuda = self.device.startswith("cuda")
        self.found: dict[str, Any] = {"imports_seconds": IMPORTS}
        self.rows: list[dict[str, Any]] = []
        self.models: dict[str, USAD] = {}

    def say(self, **figures: Any) -> None:
        """Keep and print figures."""
        self.found |= figures
        for name, figure in figures.items():
            text = f"{figure:.4g}" if isinstance(figure, float) else figure
            print(f"[{time.perf_counter() - started:6.1f} s] {name}: {text}", flush=True)

    def seconds(self, work: Callable[[], Any], least: float = 0.3) -> float:
        """Seconds of one call: the best of three rounds, each of calls enough to take `least` seconds."""
        for _ in range(3):  # the third replays a captured pass
            work()
        once = self._round(work, 1)
        calls = 1 if self.args.quick else max(1, min(50, round(least / once)))
        return min(self._round(work, calls) for _ in range(3))

    def _round(self, work: Callable[[], Any], calls: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def usad(self, precision: str) -> USAD:
        """The fusion of three branches at this precision; fitted once, in float32, so that only precision differs."""
        if precision not in self.models:
            self.models[precision] = USAD([self._branch(kind, precision) for kind in BRANCHES.values()])
        return self.models[precision]

    def _branch(self, kind: type, precision: str) -> Any:
        branch = kind(self.backbone(kind.name, precision))
        if precision == "fp32":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fewer images than channels
                branch.fit(Frames(16, branch.image_size))
        else:
            fitted = {fitted.name: fitted for fitted in self.usad("fp32").branches}[kind.name]
            branch.load_state({name: tensor.cpu() for name, tensor in fitted.state().items()})
        return branch

    def backbone(self, name: str, precision: str) -> Backbone:
        network, size = self.networks[name]
        spec = BackboneSpec(BRANCHES[name].backbone_kind, network, size, weights="random", seed=SEED)
        return build_backbone(spec, self.device, precision=precision)

    def images(self, count: int, size: int) -> Tensor:
        return frames(count, size, SEED + 1).to(self.device)

    def gflop(self, name: str) -> float:
        """10^9 operations of the network, cut after its last layer in use, for an image."""
        network, size = self.networks[name]
        net = libraries.cnn(network, (8, 16)) if name == "pc" else libraries.vit(network, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.to_empty(device="meta").eval()(torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops() / 1e9

    def rate(self, model: str, size: int, batch: int, seconds: float, gflop: float, peak: float) -> None:
        """A row of the table, in the columns of timm's benchmark files and two more."""
        tflops = gflop * batch / seconds / 1e3
        row = {
            "model": model,
            "size": size,
            "precision": "bf16",
            "batch": batch,
            "images_per_second": round(batch / seconds, 1),
            "ms_per_image": round(1e3 * seconds / batch, 4),
            "tflops": round(tflops, 1),
            "share_of_product_rate": round(tflops / self.found["product_tflops_bf16"], 4),
            "peak_memory_mb": round(peak, 1),
        }
        self.rows.append(row)
        self.say(**{f"{model}, batch {batch}": json.dumps(row)})


class Frames:
    """A loader of drawn noise, made as it is read, 8 images at a time."""

    def __init__(self, count: int, size: int) -> None:
        self.dataset, self.size = range(count), size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in torch.arange(len(self.dataset)).split(8):
            yield {"image": frames(len(index), self.size, int(index[0])), "index": index}


def frames(count: int, size: int, seed: int, strange: bool = False) -> Tensor:
    """Noise [count, 3, size, size] at three scales, like a frame's; strange ones have a bright smooth blot."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, size, size)
    for step in (1, 8, 64):
        noise = torch.randn(count, 3, -(-size // step), -(-size // step), generator=generator)
        total += torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False) / 2
    if strange:
        side = size // 6
        for image, (x, y) in zip(total, torch.randint(0, size - side, (count, 2), generator=generator), strict=True):
            image[:, y : y + side, x : x + side] = 1.5 - image[:, y : y + side, x : x + side]
    return total


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
    """Seconds until the networks stand and have made their first, second (captured) and third pass."""
    batch = bench.args.batches[0]
    for precision in ("fp32", "bf16"):
        start = time.perf_counter()
        usad = bench.usad(precision)
        bench.wait()
        bench.say(**{f"build_seconds_{precision}": time.perf_counter() - start})
        images = bench.images(batch, usad.image_size)
        passes = [bench._round(lambda usad=usad, images=images: usad.predict(images), 1) for _ in range(4)]
        bench.say(**{f"first_passes_seconds_{precision}": [round(took, 3) for took in passes]})


def checks(bench: Bench) -> None:
    """bf16 against fp32, and this device against the CPU, in features, scores and AUROC."""
    from sklearn.metrics import roc_auc_score

    exact, rough = bench.usad("fp32"), bench.usad("bf16")
    for one, other in zip(exact.branches, rough.branches, strict=True):
        images = frames(4, one.image_size, SEED).to(bench.device)
        for number, (a, b) in enumerate(zip(one.backbone(images), other.backbone(images), strict=True)):
            error = float((a - b).square().mean().sqrt() / a.square().mean().sqrt())
            bench.say(**{f"feature_error_bf16_{one.name}_{number}": error})
            assert error < FEATURE_ERROR
        if bench.cuda:
            cpu = build_backbone(BackboneSpec(**vars(one.backbone.spec)), "cpu", precision="fp32")(images[:1].cpu())
            found = one.backbone(images[:1])
            error = max(float((a.cpu() - b).abs().max() / b.abs().max()) for a, b in zip(found, cpu, strict=True))
            bench.say(**{f"feature_error_against_cpu_{one.name}": error})
            assert error < 1e-3
    scores: dict[str, list[float]] = {"fp32": [], "bf16": []}
    count = 8 if bench.args.quick else 96
    labels = [0] * count + [1] * count
    everything = torch.cat([frames(count, exact.image_size, 5), frames(count, exact.image_size, 6, strange=True)])
    for part in everything.split(bench.args.batches[0]):
        for name, usad in (("fp32", exact), ("bf16", rough)):
            scores[name] += usad.predict(part.to(bench.device)).scores.tolist()
    far = max(abs(a / b - 1) for a, b in zip(scores["bf16"], scores["fp32"], strict=True))
    aurocs = [float(roc_auc_score(labels, found)) for found in scores.values()]
    bench.say(score_error_bf16=far, auroc_fp32=aurocs[0], auroc_bf16=aurocs[1])
    assert bench.args.quick or abs(aurocs[0] - aurocs[1]) <= AUROC_ERROR  # of few images, one pair weighs more

    if bench.cuda:
        bench.say(fused_relu_keeps_nan=bool(_fused_relu_of_nan(bench).isnan().all()))


def _fused_relu_of_nan(bench: Bench) -> Tensor:
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, device=bench.device, dtype=torch.bfloat16)
    image = torch.full((1, 64, 8, 8), torch.nan, device=bench.device, dtype=torch.bfloat16)
    return FusedConv2d(conv.requires_grad_(False).to(memory_format=torch.channels_last))(image)


def networks(bench: Bench) -> None:
    """Each network alone: as the program runs it."""
    for batch in bench.args.batches:
        for branch in bench.usad("bf16").branches:
            images = bench.images(batch, branch.image_size)
            took, peak = measured(bench, lambda branch=branch, images=images: branch.backbone(images))
            bench.rate(bench.networks[branch.name][0], branch.image_size, batch, took, bench.gflop(branch.name), peak)


def fused(bench: Bench) -> None:
    """Three branches and their fusion, the fused maps and scores read back; and each branch's two stages."""
    usad = bench.usad("bf16")
    for batch in bench.args.batches:
        images = bench.images(batch, usad.image_size)
        for branch in usad.branches:
            resized = bench.images(batch, branch.image_size)
            features = branch.extract(resized)
            score = bench.seconds(lambda branch=branch, features=features: branch.score(features), 0.1)
            bench.say(**{f"score_ms_{branch.name}_{batch}": 1e3 * score / batch})

        def work(images: Tensor = images) -> None:
            part = usad.predict(images)
            part.scores.cpu(), part.maps.cpu()

        took, peak = measured(bench, work)
        bench.rate("fused inference", usad.image_size, batch, took, sum(map(bench.gflop, bench.networks)), peak)


def launches(bench: Bench) -> None:
    """What a batch asks of the device: launches, waits, and the kernels that take longest, by part."""
    usad, batch = bench.usad("bf16"), bench.args.batches[0]
    whole = bench.images(batch, usad.image_size)
    works: dict[str, Callable[[], Any]] = {"fused": lambda: usad.predict(whole)}
    for branch in usad.branches:
        images = bench.images(batch, branch.image_size)
        half, features = images.to(branch.backbone.dtype, memory_format=torch.channels_last), branch.extract(images)
        works[f"{branch.name} network"] = torch.no_grad()(partial(branch.backbone.extract, half))
        works[f"{branch.name} score"] = partial(branch.score, features)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
    for name, work in works.items():
        work(), work(), bench.wait()
        with profile(activities=activities) as profiler:
            work()
            bench.wait()
        events = profiler.key_averages()
        counts = {event.key: event.count for event in events if event.key.startswith("cuda")}
        bench.say(**{f"launches, {name}": json.dumps(counts)})
        key = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        kernels = sorted(events, key=lambda event: -getattr(event, key))[:12]
        for event in kernels if name != "fused" else ():
            if getattr(event, key):
                print(f"    {getattr(event, key) / 1e3:8.3f} ms {event.count:4d} x {event.key[:110]}")


def published(bench: Bench) -> None:
    """The published loop: one image at a time, whole networks, float32, OpenCV and SciPy."""
    from benchmarks import reference

    usad = bench.usad("fp32")
    nets = {}
    for name, (network, size) in bench.networks.items():
        make = reference.untrained_resnet if name == "pc" else reference.untrained_vit
        nets[name] = make(network, *(() if name == "pc" else (size,)), SEED).to(bench.device)
    states = {branch.name: branch.state() for branch in usad.branches}
    loop = reference.PublishedLoop(nets, states, {branch.name: branch.image_size for branch in usad.branches})
    images = bench.images(8, usad.image_size)
    for image in images[:2]:
        expected = loop(image[None])["fusion"][0]
    bench.say(score_error_against_published=abs(float(usad.predict(images[1:2]).scores) / expected - 1))
    took = bench._round(lambda: [loop(image[None]) for image in images], 1) / len(images)
    bench.say(published_loop_ms_per_image=1e3 * took)


def variants(bench: Bench) -> None:
    """The same networks run otherwise: what each of the program's choices gains, in ms an image."""
    batch = bench.args.batches[0]
    usad = bench.usad("bf16")
    with contextlib.ExitStack() as plainly:
        for name in ("use_cuda_kernels", "fold_layer_scales"):
            plainly.enter_context(mock.patch.object(backbones, name, lambda net, *_: net))
        plainly.enter_context(mock.patch.object(backbones, "onednn_gains", lambda dtype: False))
        plain = {name: bench.backbone(name, "bf16") for name in bench.networks}
    for branch in usad.branches:
        backbone, images = branch.backbone, bench.images(batch, branch.image_size)
        half = images.to(backbone.dtype, memory_format=torch.channels_last)
        works = {
            "as the program runs it": lambda backbone=backbone, images=images: backbone(images),
            "not captured": lambda backbone=backbone, half=half: backbone.extract(half),
            "plain layers, captured": lambda name=branch.name, images=images: plain[name](images),
        }
        if bench.cuda and branch.backbone_kind == "tokens":
            for attention in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                passes = sdpa_kernel(attention)(CapturedPasses(backbone.extract))
                works[attention.name] = lambda passes=passes, half=half: passes(half)
        if bench.args.compile:
            compiled = torch.compile(plain[branch.name].net, mode=bench.args.compile, dynamic=False)
            start = time.perf_counter()
            with torch.no_grad():
                compiled(half)
            bench.wait()
            bench.say(**{f"compile_seconds_{branch.name}": time.perf_counter() - start})
            passes = CapturedPasses(lambda images, compiled=compiled: as_tuple(compiled(images)))
            works[f"compiled ({bench.args.compile}), captured"] = lambda passes=passes, half=half: passes(half)
        for name, work in works.items():
            with torch.no_grad():
                bench.say(**{f"{branch.name}: {name}, ms": 1e3 * bench.seconds(work, 0.15) / batch})
    if bench.cuda:
        streams(bench, usad)


def streams(bench: Bench, usad: USAD) -> None:
    """The three networks one after the other, and each on a stream of its own."""
    for batch in (1, 8, bench.args.batches[0]):
        works = []
        for branch in usad.branches:
            half = bench.images(batch, branch.image_size).to(torch.bfloat16, memory_format=torch.channels_last)
            works.append((CapturedPasses(branch.backbone.extract), half, torch.cuda.Stream()))
            with torch.no_grad():
                own_pool = mock.patch("models.networks.cuda._pool", lambda device: torch.cuda.graph_pool_handle())
                with own_pool:
                    for _ in range(3):
                        works[-1][0](half)

        def in_turn(works: list = works) -> None:
            for passes, half, _ in works:
                passes(half)

        def beside(works: list = works) -> None:
            here = torch.cuda.current_stream()
            for passes, half, stream in works:
                stream.wait_stream(here)
                with torch.cuda.stream(stream):
                    passes(half)
            for _, _, stream in works:
                here.wait_stream(stream)

        for name, work in (("in turn", in_turn), ("on streams", beside)):
            bench.say(**{f"three networks {name}, batch {batch}, ms an image": 1e3 * bench.seconds(work, 0.1) / batch})


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


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
    """test_fusion.py --no-images as a process on 150 frames of 512 px from disk, twice; and what starting up costs."""
    import cv2
    import numpy as np

    root = bench.args.out.absolute() / "program"
    for branch in bench.usad("fp32").branches:
        branch.save(root / "models" / "belt" / f"{branch.name}.safetensors")
    count, side = (6, 64) if bench.args.quick else (150, 512)
    for index in range(count):
        strange = index % 3 == 0
        kind = "rope" if strange else "good"
        pixels = frames(1, side, index, strange)[0].permute(1, 2, 0).mul(40).add(110).clamp(0, 255).byte().numpy()
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
    for line in ("import torch", "import timm", "import models", "import torch; torch.ones(1, device='cuda')"):
        if bench.cuda or "cuda" not in line:
            took = bench._round(lambda line=line: subprocess.run([sys.executable, "-c", line], cwd=here, check=True), 1)
            bench.say(**{f"python -c '{line}', seconds": took})
    command = [sys.executable, "test_fusion.py", "--no-images", "--category", "belt", "--device", bench.device]
    for flag, folder in (("--data-root", "data"), ("--models-dir", "models"), ("--results-dir", "result")):
        command += [flag, str(root / folder)]
    command += ["--precision", "bf16"]
    for turn in ("first", "second"):
        took = bench._round(lambda: subprocess.run(command, cwd=here, check=True, stdout=subprocess.DEVNULL), 1)
        config = json.loads((root / "result" / "belt" / "fusion" / "config.json").read_text())
        bench.say(**{f"test_fusion_seconds_{turn}": took, f"test_fusion_stages_{turn}": json.dumps(config["seconds"])})


def measured(bench: Bench, work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and the device's peak memory in MB with all that lies there already."""
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    took = bench.seconds(work)
    return took, torch.cuda.max_memory_allocated() / 1e6 if bench.cuda else 0.0


STAGES = {
    stage.__name__: stage
    for stage in (product, build, networks, fused, published, launches, checks, search, program, variants)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=",".join(STAGES))
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[32, 128])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small networks and sizes")
    parser.add_argument("--compile", metavar="MODE", help="in `variants`, also torch.compile in this mode")
    parser.add_argument("--seconds", type=float, default=240, help="no stage begins later than this")
    parser.add_argument("--out", type=Path, default=Path("result/gpu"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    bench, failed = Bench(args), []
    bench.say(device=torch.cuda.get_device_name() if bench.cuda else "cpu", torch=torch.__version__)
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
