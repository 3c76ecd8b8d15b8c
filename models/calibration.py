"""What a branch says of normal images that it was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from models.branch import Branch
from utils.errors import InputError


def calibrate(branch: Branch, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation of the branch's scores, and of its maps' pixels.

    The maps are those before any per-image min-max. The loader gives two images or more.
    """
    branch.rescale_maps = False
    scores, pixels, total, squares = [], 0, 0.0, 0.0
    for batch in loader:
        batch_scores, maps = branch.predict(batch["image"].to(branch.device, non_blocking=True))
        scores.append(batch_scores.double().cpu())
        maps = maps.double()
        pixels += maps.numel()
        total += float(maps.sum())
        squares += float(maps.square().sum())
    branch.rescale_maps = True
    scores = torch.cat(scores)
    mean = total / pixels
    statistics = {
        "images": len(scores),
        "score_mean": float(scores.mean()),
        "score_std": max(float(scores.std()), 1e-12),
        "map_mean": mean,
        "map_std": max(math.sqrt(max(squares / pixels - mean**2, 0.0)), 1e-12),
    }
    if not all(map(math.isfinite, statistics.values())):
        raise InputError(f"branch '{branch.name}' gives scores that are not finite on held-out images; check them")
    return statistics
