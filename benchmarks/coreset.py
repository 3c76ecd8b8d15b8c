"""PatchCore's bank: 1 % of the patches by the greedy choice, beside plain greedy after the same projection."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks import reference
from benchmarks.measure import Row, pair, seconds
from benchmarks.settings import Settings
from models.branches.coreset import greedy_k_center, sparse_projection
from models.branches.patchcore import PatchCore, patch_features


def coreset(settings: Settings, rows: int) -> Iterator[Row]:
    """`rows` patches of the category's training images, or of drawn ones."""
    backbone = settings.backbone(PatchCore)
    images = -(-rows // (backbone.grid[0] * backbone.grid[1]))
    features = [
        patch_features(backbone(image[None].to(settings.device)))[0]
        for image in settings.pictures(images, backbone.spec.image_size)
    ]
    projection_took, projected = seconds(lambda: sparse_projection(torch.cat(features)[:rows]))
    size = max(rows // 100, 2)
    ours = functools.partial(greedy_k_center, projected, size, progress=False)
    took, plain_took, chosen, plain = pair(ours, functools.partial(reference.sampled, projected, size))
    equal = sum(a == b for a, b in zip(chosen.tolist(), plain, strict=True))
    details = {"projection_seconds": projection_took, "width": projected.shape[1]}
    against = "a difference matrix for each centre, float32"
    yield Row("coreset", rows, "patches", took, plain_took, against, f"{equal} of {size} indices equal", details)
