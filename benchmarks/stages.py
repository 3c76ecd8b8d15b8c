"""The stages of run.py: each gives rows, ours beside a plain reference, for a size."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks import reference, reference_metrics
from benchmarks.bench import SEED, Bench, Row, difference, noise
from metrics.pixel import PixelMetrics
from metrics.published_pro import PublishedPro, region_areas
from models import BRANCHES, PatchCore
from models.branches.coreset import greedy_k_center, sparse_projection
from models.branches.neighbors import NearestNeighbors, load_faiss
from models.branches.patchcore import patch_features
from utils.processes import run_python

MATRIX_BYTES = 3e9  # of distances and bank, up to which the whole matrix is computed


def extract(bench: Bench, count: int) -> Iterator[Row]:
    """Each network in batches, cut after its last layer in use, against the whole one, an image at a time in fp32."""
    for branch in BRANCHES.values():
        name, size = bench.network(branch)
        backbone, net = bench.backbone(branch), reference.whole_network(bench.spec(branch)).to(bench.device)
        images = noise(count, size, SEED).to(bench.device)
        features = reference.layer_maps if branch.backbone_kind == "maps" else reference.vit_tokens

        def ours(backbone=backbone, images=images) -> Tensor:
            for batch in images.split(bench.batch_size):
                last = backbone(batch)
            return last[-1][-1]

        def plain(net=net, images=images, features=features) -> Any:
            for image in images:
                last = features(net, image[None])
            return last[1]

        took, plain_took, found, expected = bench.pair(ours, plain)
        near = difference(found, torch.as_tensor(expected).squeeze(0))
        remark = f"whole network, one image at a time, fp32; largest difference {near:.1e} of the largest value; "
        remark += share(bench, bench.gflop(branch) * count / took)
        yield Row(f"extract {name} {bench.precision}", f"{count} images", took, plain_took, remark)


def fused(bench: Bench, count: int) -> Iterator[Row]:
    """All branches and their fusion, fitted on noise, against the published loop where it knows them all."""
    usad = bench.usad(bench.precision)
    images = noise(count, usad.image_size, 1).to(bench.device)
    loop = bench.published_loop()

    def ours() -> float:
        for batch in images.split(bench.batch_size):
            scores, maps, *_ = usad.predict(batch)
            scores, maps = scores.cpu(), maps.cpu()
        return float(scores[-1])

    def plain() -> float:
        return [loop(image[None])["fusion"][0] for image in images][-1]

    took, plain_took, found, expected = bench.pair(ours, plain if loop else None)
    remark = f"published loop, fp32; score within {abs(found / expected - 1):.1e}; " if loop else ""
    remark += share(bench, sum(map(bench.gflop, BRANCHES.values())) * count / took)
    yield Row(f"fused inference {bench.precision}", f"{count} images", took, plain_took, remark)


def share(bench: Bench, rate: float) -> str:
    """GFLOP/s beside those of matrix products."""
    return f"{rate / max(bench.product_rates(bench.precision).values()):.0%} of the product rate"


def coreset(bench: Bench, rows: int) -> Iterator[Row]:
    """1 % of `rows` patches of the category's training images, or of drawn ones."""
    backbone = bench.backbone(PatchCore)
    images = -(-rows // (backbone.grid[0] * backbone.grid[1]))
    features = [
        patch_features(backbone(image[None].to(bench.device)))[0]
        for image in bench.pictures(images, backbone.spec.image_size)
    ]
    projected = sparse_projection(torch.cat(features)[:rows])
    size = max(rows // 100, 2)
    ours = functools.partial(greedy_k_center, projected, size, progress=False)
    took, plain_took, chosen, plain = bench.pair(ours, functools.partial(reference.sampled, projected, size))
    equal = sum(a == b for a, b in zip(chosen.tolist(), plain, strict=True))
    remark = f"a difference matrix for each centre, float32; {equal} of {size} indices equal"
    yield Row("coreset", f"{rows} patches", took, plain_took, remark)


def neighbors(bench: Bench, rows: int) -> Iterator[Row]:
    """The nearest of a bank's `rows` to one image's patches; beside `torch.cdist`, and faiss where it is installed."""
    width, queries = (64, 50) if bench.quick else (1536, 900)
    generator = torch.Generator().manual_seed(SEED)
    bank = torch.randn(rows, width, generator=generator).to(bench.device)
    patches = torch.randn(queries, width, generator=generator).to(bench.device)
    ours = NearestNeighbors(bank)
    ours.faiss = None
    fits = 4 * rows * (queries + width) < MATRIX_BYTES
    sides = {"torch.cdist whole, minimum": (lambda: reference.nearest(patches, bank)[0]) if fits else None}
    if search := _faiss_search(bank):
        sides["faiss.knn"] = lambda: search(patches)[:, 0].clamp(min=0).sqrt()
    for against, plain in sides.items():
        took, plain_took, found, expected = bench.pair(lambda: ours.search(patches, 1)[0][:, 0], plain)
        near = f"; distances within {difference(found, expected):.1e}" if plain else ""
        yield Row("neighbours", f"{rows} bank rows", took, plain_took, against + near)


def _faiss_search(bank: Tensor) -> Callable[[Tensor], Tensor] | None:
    """faiss's exact search on the bank's device: queries [q, D] -> squared distances [q, 1]; None without faiss."""
    faiss = load_faiss()
    if not faiss:
        return None
    if bank.is_cuda:
        import faiss.contrib.torch_utils  # lets it take torch's tensors

        resources = faiss.StandardGpuResources()
        return lambda queries: faiss.knn_gpu(resources, queries, bank, 1)[0]
    return lambda queries: torch.from_numpy(faiss.knn(queries.numpy(), bank.numpy(), 1)[0])


def pixels(bench: Bench, count: int) -> Iterator[Row]:
    """The exact AUPRO and the pixel AUROC come with all other pixel metrics, in one pass over batches of four."""
    maps, masks = drawn_maps(count, 64 if bench.quick else 406)

    def published() -> float | None:
        metric = PublishedPro()
        for scores, mask in zip(maps, masks, strict=True):
            metric.update(scores, mask, *region_areas(mask))
        return metric.compute()

    def exact(name: str) -> float | None:
        metrics = PixelMetrics()
        for start in range(0, count, 4):
            batch = slice(start, start + 4)
            metrics.update(maps[batch], masks[batch], np.ones(len(maps[batch]), bool))
        return metrics.compute()[name]

    thresholds, lists = "200 thresholds on every image", "lists of floats, scikit-learn"
    for name, ours, plain, against in (
        ("pro_as_published", published, reference_metrics.pro_as_published, thresholds),
        ("aupro, all pixel metrics", lambda: exact("aupro"), reference_metrics.aupro, thresholds),
        ("pixel_auroc, all pixel metrics", lambda: exact("pixel_auroc"), reference_metrics.pixel_auroc, lists),
    ):
        took, plain_took, found, expected = bench.pair(ours, lambda plain=plain: plain(maps, masks))
        yield Row(name, f"{count} maps", took, plain_took, f"{against}; {found:.6f} against {expected:.6f}")


def drawn_maps(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth anomaly maps [count, side, side] (float32) that partly find the regions of their masks (bool)."""
    rng = np.random.default_rng(SEED)
    maps, masks = np.empty((count, side, side), np.float32), np.zeros((count, side, side), np.uint8)
    for scores, mask in zip(maps, masks, strict=True):
        for _ in range(rng.integers(1, 4)):
            center = tuple(int(place) for place in rng.integers(side // 8, side - side // 8, 2))
            cv2.circle(mask, center, int(rng.integers(side // 40 + 1, side // 10 + 2)), 1, -1)
        blurred = cv2.resize(rng.random((side // 8, side // 8), np.float32), (side, side))
        scores[:] = gaussian_filter(blurred + 0.5 * mask * rng.random(), 4)
    return maps, masks > 0


def fusion(bench: Bench, images: int) -> Iterator[Row]:
    """test_fusion.py --no-images and the published loop, each a whole process; the category's or drawn images."""
    category = bench.category or bench.drawn_category(f"drawn_{images}", 64 if bench.quick else 400, images)
    results, plain_file, threads = bench.work / "result", bench.work / "plain.json", torch.get_num_threads()
    models = bench.checkpoints(category.name)
    flags = ["--models-dir", models.parent, "--data-root", category.parent, "--category", category.name]
    flags += ["--results-dir", results, "--device", bench.device, "--precision", "fp32", "--no-images"]
    rounds = []
    for _ in range(1 if bench.quick else 2):  # the first round warms the file cache; the better one counts
        ours = run_python(["test_fusion.py", *flags], threads=threads)
        plain = run_python(["benchmarks/plain_fusion.py", models, category, plain_file], threads=threads)
        rounds.append((ours, plain))
    ours, plain = (min(side) for side in zip(*rounds, strict=True))
    folder = results / category.name / "fusion"
    expected, found = (json.loads(path.read_text()) for path in (plain_file, folder / "metrics.json"))
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        scores = np.array([float(row["score"]) for row in csv.DictReader(file)])
    near = np.abs(scores / np.array(expected["scores"]) - 1).max()
    figures = [f"{name} {found[name]} and {value}" for name, value in expected["metrics"].items()]
    remark = f"published loop, whole process; scores within {near:.1e}; {', '.join(figures)}; processor time "
    remark += f"{ours.cpu_seconds:.1f} s against {plain.cpu_seconds:.1f} s"
    yield Row("test_fusion.py, whole process, fp32", f"{len(scores)} images", ours.seconds, plain.seconds, remark)
