"""Statistics of a branch's scores and maps on held-out normal images."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.branches.border import STEP, border_effect, by_distance, coarse, interior, limited, rolled
from models.branches.branch import Branch
from models.branches.monochrome import as_coded
from models.branches.part import pixels_inside
from models.branches.postprocess import mean_of_top, resize_maps
from utils.command_line import warn
from utils.distributed import gathered
from utils.errors import InputError
from utils.gather import all_rows

Statistics = dict[str, "float | list[float]"]
LEAST = 1e-12  # standard deviation
SAME = 1e-6  # relative differences of scores that are rounding
BORDER_IMAGES = 32  # on which the border's effect is measured: the held-out ones, and fitted ones where those are few


class Predicted(NamedTuple):
    """What a branch predicts for the images of a loader, those of all processes; maps are coarse."""

    images: int  # their number
    scores: Tensor  # [n] float64
    maps: Tensor  # [n, S // 4, S // 4] float64
    rolled: Tensor  # [m, 2, S // 4, S // 4], of the first images rolled, and of themselves, rolled afterwards


def calibrate(branch: Branch, held_out: Iterable[dict[str, Any]], fitted: Iterable[dict[str, Any]] = ()) -> Statistics:
    """Mean and standard deviation of the branch's scores, its maps' values, and the tops of its standardised maps.

    The maps' are those of the interior, in squares of 4 x 4 pixels. `border_shift` and `border_scale` are the border's
    own effect (models/branches/border.py), in standard deviations, of which standardised maps are free; it is measured
    on the images of `fitted`, too. `held_out` gives at least two images.
    """
    held, more = predictions(branch, held_out), predictions(branch, fitted)
    inside = torch.ones(held.maps.shape[1:], dtype=torch.bool)
    if branch.roi is not None:
        inside = pixels_inside(branch.roi, len(inside), inside.device)
    groups = [part for part in (held, more) if len(part.maps)]
    moments = [interior_moments(part.maps, inside) for part in groups]
    scaled = [(part.maps - mean) / std for part, (mean, std) in zip(groups, moments, strict=True)]
    shift, scale = border_effect(scaled, inside)
    if branch.roi is None:  # what is moved out of a region is not looked at
        pairs = [part.rolled / std for part, (_, std) in zip(groups, moments, strict=True)]
        shift, scale = limited((shift, scale), pairs)
    mean, deviation = moments[0]
    statistics = {
        "images": held.images,
        "score_mean": float(held.scores.mean()),
        "score_std": max(float(held.scores.std()), LEAST),
        "map_mean": mean,
        "map_std": deviation,
        "border_shift": shift,
        "border_scale": scale,
    }
    fields = map_statistics(statistics, branch.image_size, branch.image_size)
    mean, deviation = coarse(torch.stack(fields))
    tops = mean_of_top((held.maps - mean) / deviation).double()
    statistics |= {"top_mean": float(tops.mean()), "top_std": max(float(tops.std()), LEAST)}
    if statistics["score_std"] <= max(SAME * abs(statistics["score_mean"]), LEAST):
        warn(f"branch '{branch.name}' gives all held-out images one score, so its statistics mean nothing; check them")
    if not all(math.isfinite(value) for entry in statistics.values() for value in np.atleast_1d(entry)):
        raise InputError(f"branch '{branch.name}' gives scores that are not finite on held-out images; check them")
    return statistics


def predictions(branch: Branch, loader: Iterable[dict[str, Any]]) -> Predicted:
    """The branch's predictions; an image without colour counts twice, once as a codec gives it (monochrome.py)."""
    count, side = 0, branch.image_size // STEP
    scores, maps = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, side, side)]
    pairs = [torch.zeros(0, 2, side, side)]
    for batch in loader:
        images = batch["image"].to(branch.device, non_blocking=True)
        count += len(images)
        seen = [images]
        if branch.backbone is not None:
            _, coded = as_coded(branch.backbone.pixels(images), batch["index"], branch.backbone)
            if len(coded):
                seen.append(coded)
        parts = [branch.predict(some) for some in seen]
        scores += [part.scores.double().cpu() for part in parts]
        own = [coarse(part.maps).cpu() for part in parts]
        maps += own
        first = (batch["index"] < BORDER_IMAGES).nonzero()[:, 0]
        if len(first) and branch.roi is None:
            moved = coarse(branch.predict(rolled(images[first])).maps).cpu()
            pairs.append(torch.stack([moved, rolled(own[0][first], 1)], 1))
    scores, maps, pairs = (all_rows(torch.cat(rows)).double() for rows in (scores, maps, pairs))
    return Predicted(sum(gathered(count)), scores, maps, pairs)


def interior_moments(maps: Tensor, inside: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the values of maps [n, s, s] that are `inside` [s, s] and far from the border."""
    chosen = inside & interior(len(inside))
    values = maps[:, chosen if chosen.any() else inside]
    return float(values.mean()), max(float(values.std(correction=0)), LEAST)


def map_statistics(statistics: Statistics, image_size: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [size, size] of a normal map's values at each place, from those of `image_size`."""
    shift, scale = (statistics.get(f"border_{name}", []) for name in ("shift", "scale"))  # of old checkpoints: none
    mean = statistics["map_mean"] + statistics["map_std"] * by_distance(shift, 0.0, image_size)
    deviation = statistics["map_std"] * by_distance(scale, 1.0, image_size)
    return tuple(resize_maps(torch.stack([mean, deviation]), size))
