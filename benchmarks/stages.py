"""The stages of a run, each on its own and at one size: the project beside the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.measure import Row, pair, seconds
from benchmarks.settings import SEED, Settings
from datasets.images import EXTENSIONS
from datasets.loading import to_tensor
from models import USAD
from models.branches.coreset import LazyGreedy, sparse_projection
from models.branches.neighbors import NearestNeighbors
from models.branches.patch_store import PatchStore
from models.branches.patchcore import patch_features
from models.branches.postprocess import gaussian_blur, resize_maps
from models.networks.backbones import BackboneSpec, build_backbone, empty_backbone
from scenes.scenes import draw_scene

QUERY_BUDGET = 3e9  # bytes of the whole distance matrix and bank up to which the reference is run


def extract(settings: Settings, images: int) -> Iterator[Row]:
    """Each network in batches, against the same network whole, one image at a time, in fp32."""
    for branch, (name, size) in settings.networks.items():
        tokens = branch != "pc"
        spec = BackboneSpec("tokens" if tokens else "maps", name, size, weights="random", seed=SEED)
        backbone = build_backbone(spec, settings.device, precision=settings.precision)
        net = plain_network(branch, settings)
        batch = torch.randn(settings.batch_size, 3, size, size, generator=torch.Generator().manual_seed(SEED))
        batch = batch.to(settings.device)
        operations = settings.gflop(branch)

        def ours(backbone=backbone, batch=batch) -> Tensor:
            for start in range(0, images, len(batch)):
                last = backbone(batch[: images - start])
            return last[-1]

        few = min(images, settings.reference_images)

        def plain(net=net, batch=batch, tokens=tokens, few=few) -> Any:
            for index in range(few):
                image = batch[index % len(batch)][None]
                last = reference.vit_tokens(net, image)[1] if tokens else reference.layer_maps(net, image)[1]
            return last

        took, reference_took, _, expected = pair(ours, plain, 3)
        position = (few - 1) % len(batch)
        near = _difference(backbone(batch)[-1][position], torch.as_tensor(expected).squeeze(0))
        rate = operations * images / took
        yield Row(
            f"extract {name} {settings.precision}",
            images,
            "images",
            took,
            reference_took * images / few,
            "whole network, one image at a time, fp32" + (f" (timed on {few} images)" if few < images else ""),
            f"largest difference {near:.1e} of the largest value",
            {
                "gflop_per_image": operations,
                "gflop_per_second": rate,
                "product_gflop_per_second": settings.rate,
                "share_of_product_rate": rate / settings.rate,
                "reference_share_of_product_rate": operations * few / reference_took / settings.rate,
                "peak_gpu_mb": peak_gpu(settings, ours),
            },
        )


def fused(settings: Settings, images: int) -> Iterator[Row]:
    """The three branches and their fusion on images in memory, against the published loop; fitted on noise."""
    branches = settings.branches
    usad, size = USAD(list(branches.values())), max(branch.image_size for branch in branches.values())
    nets = {name: plain_network(name, settings) for name in branches}
    states = {name: branch.state() for name, branch in branches.items()}
    loop = reference.PublishedLoop(nets, states, {name: branch.image_size for name, branch in branches.items()})
    batch = torch.randn(settings.batch_size, 3, size, size, generator=torch.Generator().manual_seed(SEED + 1))
    batch, few = batch.to(settings.device), min(images, settings.reference_images)

    def ours() -> Tensor:
        for start in range(0, images, len(batch)):
            scores, maps, *_ = usad.predict(batch[: images - start])
            maps.cpu()
        return scores.cpu()

    def plain() -> float:
        scores = [loop(batch[index % len(batch)][None])["fusion"][0] for index in range(few)]
        return scores[0]

    took, reference_took, _, expected = pair(ours, plain)
    near = abs(float(usad.predict(batch).scores[0]) / expected - 1)
    rate = sum(settings.gflop(name) for name in branches) * images / took
    yield Row(
        f"fused inference {settings.precision}",
        images,
        "images",
        took,
        reference_took * images / few,
        "published loop, fp32" + (f" (timed on {few} images)" if few < images else ""),
        f"score within {near:.1e}",
        {
            "gflop_per_second": rate,
            "share_of_product_rate": rate / settings.rate,
            "peak_gpu_mb": peak_gpu(settings, ours),
        },
    )


def plain_network(branch: str, settings: Settings) -> nn.Module:
    """The branch's whole network in fp32, with the same untrained values."""
    name, size = settings.networks[branch]
    net = reference.untrained_resnet(name, SEED) if branch == "pc" else reference.untrained_vit(name, size, SEED)
    return net.to(settings.device)


def peak_gpu(settings: Settings, work: Callable[[], Any]) -> float | None:
    """Peak memory of one more call on the GPU, in MB with all that lies there already; None on a CPU."""
    if not settings.device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e6


def coreset(settings: Settings, rows: int) -> Iterator[Row]:
    """1 % of the patches, on features of drawn and of real images, against plain greedy after the projection."""
    for kind in ("drawn", "real") if settings.images else ("drawn",):
        features = wide_features(settings, rows, kind)
        projection_took, projected = seconds(lambda features=features: sparse_projection(features))
        projected, size = projected.to(settings.device), max(rows // 100, 2)

        def ours(projected: Tensor = projected, size: int = size) -> tuple[list[int], int]:
            greedy = LazyGreedy(projected)
            return greedy.select(size, progress=False).tolist(), greedy.evaluations

        took, plain_took, (chosen, evaluations), plain = pair(
            ours, lambda projected=projected, size=size: reference.sampled(projected, size)
        )
        equal = sum(a == b for a, b in zip(chosen, plain, strict=True))
        yield Row(
            f"coreset {kind}",
            rows,
            "patches",
            took,
            plain_took,
            "a difference matrix for each centre, float32",
            f"{equal} of {size} indices equal",
            {
                "share_of_distances": evaluations / (rows * size),
                "projection_seconds": projection_took,
                "width": projected.shape[1],
            },
        )


def sample(settings: Settings, images: int) -> Iterator[Row]:
    """What PatchCore's bank loses where the budget holds a share of the training patches; means of five samples."""
    name, size = settings.networks["pc"]
    grid = empty_backbone(BackboneSpec("maps", name, size)).grid
    patches = wide_features(settings, images * grid[0] * grid[1], "drawn").unflatten(0, (images, -1))

    def distances(share: float, seed: int, entries: int | None = None) -> Tensor:
        """The farthest and the average patch of all from the bank, of 1 % of the sample or so many entries."""
        store = PatchStore(images, share * 4e-9 * patches.numel(), seed * images)
        store.add(patches, torch.arange(images))
        rows = store.rows()
        chosen = LazyGreedy(sparse_projection(rows)).select(entries or max(len(rows) // 100, 2), progress=False)
        far = NearestNeighbors(rows[chosen]).search(patches.flatten(0, 1), 1)[0]
        return torch.stack([far.max(), far.mean()])

    full_took, full = seconds(lambda: distances(2, 0))
    entries = max(patches.shape[0] * patches.shape[1] // 100, 2)
    for share in (0.5, 0.25, 0.1):
        took, found = seconds(lambda share=share: torch.stack([distances(share, seed) for seed in range(5)]).mean(0))
        same = torch.stack([distances(share, seed, entries) for seed in range(5)]).mean(0)
        farther, equal = ((part / full).tolist() for part in (found, same))
        yield Row(
            f"bank from {share:.0%} of the patches",
            images,
            "training images",
            took / 5,
            full_took,
            "a bank of 1 % of all",
            f"farthest patch {farther[0]:.2f}, average {farther[1]:.2f} times as far",
            {"radius": farther[0], "mean": farther[1], "radius_same_entries": equal[0], "mean_same_entries": equal[1]},
        )


def wide_features(settings: Settings, rows: int, kind: str) -> Tensor:
    """Patch features [rows, D] of drawn or real images."""
    name, size = settings.networks["pc"]
    backbone = build_backbone(BackboneSpec("maps", name, size, weights="random", seed=SEED), settings.device)
    needed = -(-rows // (backbone.grid[0] * backbone.grid[1]))
    parts = []
    for start in range(0, needed, 8):
        numbers = range(start, min(start + 8, needed))
        batch = torch.stack([picture(settings, number, size, kind) for number in numbers])
        parts.append(patch_features(backbone(batch.to(settings.device))).flatten(0, 1).cpu())
    return torch.cat(parts)[:rows]


def picture(settings: Settings, number: int, size: int, kind: str) -> Tensor:
    """Image number `number` [3, size, size]: a drawn scene, or one of the real images (again from the first)."""
    if kind == "drawn":
        image = Image.fromarray(np.ascontiguousarray(draw_scene((SEED, number), size)[0][..., ::-1]))
    else:
        files = image_files(settings.images)
        image = Image.open(files[number % len(files)]).convert("RGB")
    return to_tensor(image, size, "bilinear")


def image_files(folder: Path) -> list[Path]:
    """The images in `folder` and its folders."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)


def neighbors(settings: Settings, rows: int) -> Iterator[Row]:
    """The nearest bank row of one image's patches, against the whole matrix of distances; faiss if it is there."""
    width, queries = (64, 50) if settings.quick else (1536, 900)
    generator = torch.Generator().manual_seed(SEED)
    bank = torch.randn(rows, width, generator=generator).to(settings.device)
    patches = torch.randn(queries, width, generator=generator).to(settings.device)
    ours = NearestNeighbors(bank)
    ours.faiss = None
    fits = 4 * rows * (queries + width) < QUERY_BUDGET
    took, plain_took, found, plain = pair(
        lambda: ours.search(patches, 1), (lambda: reference.nearest(patches, bank)) if fits else None
    )
    agreement = f"distances within {_difference(found[0][:, 0], plain[0]):.1e}" if plain else ""
    yield Row("neighbours", rows, "bank rows", took, plain_took, "torch.cdist whole, minimum", agreement)
    try:
        import faiss
    except ImportError:
        return
    if settings.device == "cpu":
        faiss.omp_set_num_threads(torch.get_num_threads())
        took, faiss_took, found, other = pair(
            lambda: ours.search(patches, 1), lambda: faiss.knn(patches.numpy(), bank.numpy(), 1)
        )
        near = _difference(found[0][:, 0], torch.from_numpy(other[0][:, 0]).clamp(min=0).sqrt())
        yield Row("neighbours, faiss", rows, "bank rows", took, faiss_took, "faiss.knn", f"distances within {near:.1e}")


def postprocess(settings: Settings, side: int) -> Iterator[Row]:
    """Patch scores of 16 images to maps: resize, min-max, blur; against OpenCV and SciPy, map by map."""
    small = torch.rand(16, side // 14, side // 14, generator=torch.Generator().manual_seed(SEED))
    on_device = small.to(settings.device)

    def plain() -> np.ndarray:
        maps = []
        for scores in small.numpy():
            whole = cv2.resize(scores, (side, side), interpolation=cv2.INTER_LINEAR)
            maps.append(gaussian_filter((whole - whole.min()) / np.ptp(whole), 4))
        return np.stack(maps)

    took, plain_took, maps, expected = pair(lambda: gaussian_blur(resize_maps(on_device, side), 4.0).cpu(), plain)
    near = _difference(maps, torch.from_numpy(expected))
    agreement = f"maps within {near:.1e}"
    yield Row("post-processing", 16 * side**2, "pixels", took, plain_took, "OpenCV and SciPy, map by map", agreement)


def _difference(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    expected = expected.to(ours.device)
    return float((ours - expected).abs().max() / expected.abs().max())
