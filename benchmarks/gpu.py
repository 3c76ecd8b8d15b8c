"""One card in a few minutes: images a second of networks and fusion, launches, precision, search, the whole program.

python benchmarks/gpu.py                                  # on a GPU; writes results.json and gpu.csv to --out
python benchmarks/gpu.py --quick --device cpu             # whether it works: small networks, seconds
python benchmarks/gpu.py --stages networks,fused --batches 32,128

Networks are untrained, branches fitted on noise; every rate is taken in this one run, frames lying in memory but for
the stage `program`.
"""

from __future__ import annotations

import csv
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import Bench, noise
from models import USAD
from models.branches.neighbors import NearestNeighbors
from utils.command_line import Parser, run, some_of
from utils.files import write_json
from utils.gpu import CapturedPasses, ReadBack
from utils.processes import run_python

AUROC_ERROR = 0.002
VISIBLE = 0.8, 0.97  # AUROC of anomalies that untrained networks neither miss nor always see


class Card(Bench):
    """A bench, the batches that are asked for, and what was found."""

    def __init__(self, device: str, quick: bool, work: Path, batches: list[int]) -> None:
        super().__init__(device, "bf16", quick, work)
        self.batches = batches
        self.found: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def say(self, **figures: Any) -> None:
        """Keep and print figures."""
        self.found |= figures
        for name, figure in figures.items():
            print(f"{name}: {figure:.4g}" if isinstance(figure, float) else f"{name}: {figure}", flush=True)

    def images(self, count: int, size: int) -> Tensor:
        return noise(count, size, 23, self.device)

    def rate(self, model: str, size: int, batch: int, gflop: float, work: Callable[[], Any]) -> None:
        """Time `work` on a batch: a row of the table, in the columns of timm's benchmark files and two more."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(work)
        tflops = gflop * batch / seconds / 1e3
        row = {
            "model": model,
            "size": size,
            "precision": self.precision,
            "batch": batch,
            "images_per_second": round(batch / seconds, 1),
            "ms_per_image": round(1e3 * seconds / batch, 4),
            "tflops": round(tflops, 1),
            "share_of_product_rate": round(1e3 * tflops / max(self.product_rates(self.precision).values()), 4),
            "peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if self.cuda else 0.0,
        }
        self.rows.append(row)
        self.say(**{f"{model}, batch {batch}": json.dumps(row)})


def networks(card: Card) -> None:
    """Each network alone: as the program runs it."""
    for batch in card.batches:
        for branch in card.usad("bf16").branches:
            images = card.images(batch, branch.image_size)
            work = lambda branch=branch, images=images: branch.backbone(images)  # noqa: E731
            card.rate(branch.backbone.spec.name, branch.image_size, batch, card.gflop(type(branch)), work)


def fused(card: Card) -> None:
    """Three branches and their fusion, fused maps and scores read back; and each branch's score alone."""
    usad = card.usad("bf16")
    for batch in card.batches:
        images = card.images(batch, usad.image_size)
        gflop = sum(card.gflop(type(branch)) for branch in usad.branches)
        card.rate("fused inference", usad.image_size, batch, gflop, reading_back(card, usad, images))
        assert not card.cuda or usad.passes.obstacle is None, usad.passes.obstacle
        for branch in usad.branches:
            features = branch.extract(card.images(batch, branch.image_size))
            flat = CapturedPasses(lambda _, branch=branch, features=features: branch.score(features))
            score = card.seconds(lambda flat=flat, images=images: flat(images[:, 0, 0]), 0.1)
            card.say(**{f"score_ms_{branch.name}_{batch}": 1e3 * score / batch})


def reading_back(card: Card, usad: USAD, images: Tensor) -> Callable[[], None]:
    """A call computes a batch and waits for the results of the one before it, as the program does."""
    before: list[ReadBack] = []

    def work() -> None:
        part = usad.predict(images)
        if card.cuda:
            before.append(ReadBack((part.scores, part.maps), torch.device(card.device)))
        if len(before) > 1:
            before.pop(0).wait()

    return work


def launches(card: Card) -> None:
    """How often a batch calls CUDA, by call."""
    usad = card.usad("bf16")
    images = card.images(card.batches[0], usad.image_size)
    for _ in range(3):
        usad.predict(images)
    card.wait()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * card.cuda) as profiler:
        usad.predict(images)
        card.wait()
    calls = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("cuda")}
    card.say(launches=json.dumps(calls))


def published(card: Card) -> None:
    """The published loop: one image at a time, whole networks, float32, OpenCV and SciPy."""
    usad, loop = card.usad("fp32"), card.published_loop()
    images = card.images(8, usad.image_size)
    error = abs(float(usad.predict(images[:1]).scores) / loop(images[:1])["fusion"][0] - 1)
    card.say(score_error_against_published=error)
    assert error < 1e-3
    took = card.round(lambda: [loop(image[None]) for image in images]) / len(images)
    card.say(published_loop_ms_per_image=1e3 * took)


def precision(card: Card) -> None:
    """Scores and AUROC in bf16 against fp32, on the same frames; how strong their spots are is decided in fp32."""
    from sklearn.metrics import roc_auc_score

    def scores(usad: USAD, spot: float, count: int) -> list[float]:
        found = []
        for start in range(0, count, 32):
            seed = start + (2000 if spot else 1000)
            found += usad.predict(noise(32, usad.image_size, seed, card.device, spot)).scores.tolist()
        return found

    def auroc_of(usad: USAD, spot: float, count: int) -> tuple[float, list[float]]:
        found = scores(usad, 0.0, count) + scores(usad, spot, count)
        return float(roc_auc_score([0] * count + [1] * count, found)), found

    exact, rough = card.usad("fp32"), card.usad("bf16")
    for spot in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0):
        if VISIBLE[0] < auroc_of(exact, spot, 32)[0] < VISIBLE[1]:
            break
    count = 32 if card.quick else 512
    (fp32, expected), (bf16, found) = (auroc_of(usad, spot, count) for usad in (exact, rough))
    far = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    card.say(spot=spot, images=2 * count, score_error_bf16=far, auroc_fp32=fp32, auroc_bf16=bf16)
    assert card.quick or abs(fp32 - bf16) <= AUROC_ERROR  # of few images, one pair weighs more


def search(card: Card) -> None:
    """PatchCore's search: ms an image of 900 patches of width 1536, against a whole matrix of distances."""
    queries = torch.randn(900 * 32 if card.cuda else 900, 1536, device=card.device)
    for rows in (144, 1000) if card.quick else (144, 10_000, 100_000):
        bank = NearestNeighbors(torch.randn(rows, 1536, device=card.device))
        ours = card.seconds(lambda bank=bank: bank.search(queries, 1), 0.1)
        whole = card.seconds(lambda bank=bank: torch.cdist(queries[:900], bank.rows).min(1), 0.1)
        card.say(**{f"search_ms_{rows}": 1e3 * ours * 900 / len(queries), f"cdist_ms_{rows}": 1e3 * whole})


def program(card: Card) -> None:
    """test_fusion.py --no-images as a process on 150 drawn frames of 512 px from disk, and what its imports cost."""
    data = card.drawn_category("belt", *((64, 6) if card.quick else (512, 150)))
    results = card.work / "result"
    flags = ["--data-root", data.parent, "--models-dir", card.checkpoints("belt").parent, "--results-dir", results]
    flags += ["--category", "belt", "--no-images", "--device", card.device, "--precision", card.precision]
    for turn in ("first", "second"):  # the first warms the file cache
        card.say(**{f"test_fusion_seconds_{turn}": run_python(["test_fusion.py", *flags]).seconds})
    config = json.loads((results / "belt" / "fusion" / "config.json").read_text(encoding="utf-8"))
    card.say(test_fusion_stages=json.dumps(config["seconds"]))
    card.say(import_seconds=run_python(["-c", "import torch, torchvision, timm"]).seconds)


STAGES = {stage.__name__: stage for stage in (networks, fused, published, launches, precision, search, program)}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--stages", type=some_of(STAGES), default=list(STAGES), help=f"default: {','.join(STAGES)}")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[32, 128])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small networks and sizes")
    parser.add_argument("--out", type=Path, default=Path("result/gpu"), help="default: result/gpu")
    args = parser.parse_args()
    work = args.out.absolute() / "work" / ("quick" if args.quick else "full")
    work.mkdir(parents=True, exist_ok=True)
    card, failed, start = Card(args.device, args.quick, work, args.batches), [], time.perf_counter()
    card.say(device=torch.cuda.get_device_name() if card.cuda else "cpu", torch=torch.__version__)
    card.say(product_tflops_bf16=card.product_rates("bf16")["torch.mm"] / 1e3)
    for name in args.stages:
        try:
            STAGES[name](card)
        except Exception:  # the other stages need not be lost
            failed.append(name)
            traceback.print_exc()
        write_json(args.out / "results.json", card.found)
    report(card, args.out)
    print(f"failed: {', '.join(failed) or 'nothing'}; {time.perf_counter() - start:.0f} s")
    sys.exit(bool(failed))


def report(card: Card, out: Path) -> None:
    """The table, on the screen and as CSV, and the ratios that matter."""
    if card.rows:
        with (out / "gpu.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(card.rows[0]))
            writer.writeheader()
            writer.writerows(card.rows)
    print(f"\n{'model':26}{'batch':>6}{'images/s':>10}{'ms':>8}{'TFLOP/s':>9}{'share':>7}{'MB':>8}")
    for row in card.rows:
        name, batch, rate, ms, tflops, share, memory = (row[key] for key in list(row)[:1] + list(row)[3:])
        print(f"{name:26}{batch:6}{rate:10}{ms:8}{tflops:9}{share:7.1%}{memory:8.0f}")
    for batch in card.batches:
        rows = [row for row in card.rows if row["batch"] == batch]
        bare = sum(row["ms_per_image"] for row in rows if row["model"] != "fused inference")
        for whole in (row["ms_per_image"] for row in rows if row["model"] == "fused inference"):
            print(f"batch {batch}: {bare / whole:.1%} of the bare networks' combined rate")
            if loop := card.found.get("published_loop_ms_per_image"):
                print(f"batch {batch}: {loop / whole:.1f} x the published loop")


if __name__ == "__main__":
    run(main)
