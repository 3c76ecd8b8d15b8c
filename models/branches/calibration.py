"""Statistics of a branch's scores and maps on held-out normal images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from models.branches.branch import Branch, pixels_inside
from models.branches.postprocess import mean_of_top
from utils.errors import InputError
from utils.gather import all_rows


def calibrate(branch: Branch, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation of the branch's scores, of its maps' tops (`mean_of_top`), and of the maps' pixels.

    The loader gives at least two images.
    """
    inside = branch.roi and pixels_inside(branch.roi, branch.image_size, torch.device(branch.device))
    scores, sums = [torch.zeros(0, 2, dtype=torch.float64)], [torch.zeros(0, 3, dtype=torch.float64)]
    for batch in loader:
        part = branch.predict(batch["image"].to(branch.device, non_blocking=True))
        maps = part.maps.double()
        looked_at = maps if inside is None else maps[:, inside]
        scores.append(torch.stack([part.scores.double(), mean_of_top(maps)], 1).cpu())
        sums.append(torch.tensor([[looked_at.numel(), looked_at.sum(), looked_at.square().sum()]], dtype=torch.float64))
    scores, tops = all_rows(torch.cat(scores)).unbind(1)
    pixels, total, squares = all_rows(torch.cat(sums)).sum(0).tolist()
    mean = total / pixels
    statistics = {
        "images": len(scores),
        "score_mean": float(scores.mean()),
        "score_std": max(float(scores.std()), 1e-12),
        "top_mean": float(tops.mean()),
        "top_std": max(float(tops.std()), 1e-12),
        "map_mean": mean,
        "map_std": max(math.sqrt(max(squares / pixels - mean**2, 0.0)), 1e-12),
    }
    if not all(map(math.isfinite, statistics.values())):
        raise InputError(f"branch '{branch.name}' gives scores that are not finite on held-out images; check them")
    return statistics
