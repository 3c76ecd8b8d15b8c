"""Statistics of a branch's scores and maps on held-out normal images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.branches.border import BorderEffect, across, coarse
from models.branches.branch import Branch, pixels_inside
from models.branches.postprocess import mean_of_top, resize_maps
from utils.errors import InputError
from utils.gather import all_rows

Statistics = dict[str, "float | list[float]"]
LEAST = 1e-12  # standard deviation


def calibrate(branch: Branch, loader: Iterable[dict[str, Any]]) -> Statistics:
    """Mean and standard deviation of the branch's scores, its maps' values, and the tops of its standardised maps.

    `border_added` and `border_factor` are the effect of the border (models/branches/border.py), of which standardised
    maps are free. Maps are taken in squares of 4 x 4 pixels. The loader gives at least two images.
    """
    scores, maps = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, *[branch.image_size // 4] * 2)]
    border = BorderEffect(branch)
    for batch in loader:
        images = batch["image"].to(branch.device, non_blocking=True)
        part = branch.predict(images)
        scores.append(part.scores.double().cpu())
        maps.append(coarse(part.maps).cpu())
        border.update(images, batch["index"])
    scores, maps = all_rows(torch.cat(scores)), all_rows(torch.cat(maps))
    values = maps.double()
    if branch.roi is not None:
        values = values[:, pixels_inside(branch.roi, maps.shape[-1], maps.device)]
    added, factor = border.result()
    statistics = {
        "images": len(scores),
        "score_mean": float(scores.mean()),
        "score_std": max(float(scores.std()), LEAST),
        "map_mean": float(values.mean()),
        "map_std": max(float(values.std(correction=0)), LEAST),
        "border_added": added,
        "border_factor": factor,
    }
    mean, deviation = map_statistics(statistics, branch.image_size, maps.shape[-1])
    tops = mean_of_top((maps - mean) / deviation).double()
    statistics |= {"top_mean": float(tops.mean()), "top_std": max(float(tops.std()), LEAST)}
    if not all(math.isfinite(value) for entry in statistics.values() for value in np.atleast_1d(entry)):
        raise InputError(f"branch '{branch.name}' gives scores that are not finite on held-out images; check them")
    return statistics


def map_statistics(statistics: Statistics, image_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [size, size] of a normal map's values at each place, from those of `image_size`."""
    added, factor = (statistics.get(f"border_{name}", []) for name in ("added", "factor"))  # of old checkpoints: none
    added, factor = across(added, 0.0, image_size), across(factor, 1.0, image_size)
    mean = statistics["map_mean"] + added[:, None] + added
    deviation = statistics["map_std"] * factor[:, None] * factor
    return tuple(resize_maps(torch.stack([mean, deviation]), size))
