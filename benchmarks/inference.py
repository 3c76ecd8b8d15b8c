"""Images in memory: each network alone, and all branches with their fusion, beside the published way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.measure import Row, difference, pair
from benchmarks.settings import Settings, noise
from models import BRANCHES, USAD


def extract(settings: Settings, count: int) -> Iterator[Row]:
    """Each network in batches, cut after its last layer in use, against the whole one, an image at a time in fp32."""
    for branch in BRANCHES.values():
        name, size = settings.network(branch)
        backbone, net = settings.backbone(branch), settings.plain_network(branch)
        images = noise(count, size).to(settings.device)
        features = reference.layer_maps if branch.backbone_kind == "maps" else reference.vit_tokens

        def ours(backbone=backbone, images=images) -> Tensor:
            for batch in images.split(settings.batch_size):
                last = backbone(batch)
            return last[-1][-1]

        def plain(net=net, images=images, features=features) -> Any:
            for image in images:
                last = features(net, image[None])
            return last[1]

        took, plain_took, found, expected = pair(ours, plain)
        near = difference(found, torch.as_tensor(expected).squeeze(0))
        yield Row(
            f"extract {name} {settings.precision}",
            count,
            "images",
            took,
            plain_took,
            "whole network, one image at a time, fp32",
            f"largest difference {near:.1e} of the largest value",
            rates(settings, settings.gflop(branch) * count, took, ours),
        )


def fused(settings: Settings, count: int) -> Iterator[Row]:
    """All branches and their fusion, fitted on noise, against the published loop where it knows them all."""
    branches = settings.branches
    usad = USAD(list(branches.values()))
    images = noise(count, usad.image_size, seed=1).to(settings.device)
    loop = None
    if set(branches) == reference.BRANCHES:
        nets = {kind.name: settings.plain_network(kind) for kind in BRANCHES.values()}
        states = {name: branch.state() for name, branch in branches.items()}
        loop = reference.PublishedLoop(nets, states, {name: branch.image_size for name, branch in branches.items()})

    def ours() -> float:
        for batch in images.split(settings.batch_size):
            scores, maps, *_ = usad.predict(batch)
            scores, maps = scores.cpu(), maps.cpu()
        return float(scores[-1])

    def plain() -> float:
        return [loop(image[None])["fusion"][0] for image in images][-1]

    took, plain_took, found, expected = pair(ours, plain if loop else None)
    yield Row(
        f"fused inference {settings.precision}",
        count,
        "images",
        took,
        plain_took,
        "published loop, fp32" if loop else "nothing: the published loop has other branches",
        f"score within {abs(found / expected - 1):.1e}" if loop else "",
        rates(settings, sum(map(settings.gflop, BRANCHES.values())) * count, took, ours),
    )


def rates(settings: Settings, gflop: float, took: float, work: Callable[[], Any]) -> dict[str, Any]:
    """Speed beside that of matrix products, and the peak memory of one more call on a GPU."""
    peak = None
    if settings.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        work()
        peak = torch.cuda.max_memory_allocated() / 1e6
    share = gflop / took / max(settings.rates.values())
    return {"gflop_per_second": gflop / took, "share_of_product_rate": share, "peak_gpu_mb": peak}
