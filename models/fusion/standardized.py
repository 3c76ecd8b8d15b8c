"""A fusion for small data sets, in which the raw scales of the branches mean little."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.branches.border import coarse
from models.branches.branch import Branch
from models.branches.calibration import map_statistics
from models.branches.part import Part
from models.branches.postprocess import mean_of_top
from models.fusion.rule import FusionRule
from utils.errors import InputError

DOUBT = 3  # standard errors, beyond which one true value in 700 lies


class Standardized(FusionRule):
    """Everything in standard deviations of held-out normal images.

    For each branch the score, the map, and the mean of the map's highest hundredth (its top) are standardised; the map
    without what the frame's border does to it (models/branches/border.py). M is the mean of the maps and t that of the
    tops, weighted by the branches' `map_weight` (PatchCore 16, the others 1). s is (Σ (-2 log p)²)^¼ over t and the
    scores that are `own_evidence` (MACLU's), where p is the chance that a normal image has a higher value, under a
    normal distribution. So the stronger finding weighs more: in Fisher's combination, Σ -2 log p, a weak branch would
    dilute it. A normal image scores about 1.5, a very strange one its largest deviation.

    MACLU's score is one number for a whole image, which drifts with the load and the light, and few images tell how
    far. So its mean and its deviation are taken at the upper ends of what the held-out images leave open.
    """

    name = "standardized"

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__(branches)
        self._fields: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.total_weight = sum(branch.map_weight for branch in branches)
        for branch in branches:
            if branch.calibration is None:
                raise InputError(
                    f"--fusion standardized needs held-out statistics, and branch '{branch.name}' has none; "
                    "train the three branches with --holdout-ratio, for instance 0.2"
                )

    def fuse(self, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
        scores, tops, fused = [], 0.0, 0.0
        for name, part in parts.items():
            branch = self.branches[name]
            weight = branch.map_weight / self.total_weight
            if branch.own_evidence:
                deviations = _standardized(part.scores.double(), branch, "score")
                scores.append(_doubted(deviations, branch.calibration["images"]))
            mean, deviation = self._map_statistics(branch, part.maps)
            maps = (part.maps - mean) / deviation
            tops = tops + weight * _standardized(mean_of_top(coarse(maps)).double(), branch, "top")
            fused = fused + weight * maps
        surprises = -2 * torch.special.log_ndtr(-torch.stack([*scores, tops]))
        return surprises.square().sum(0).sqrt().sqrt(), fused

    def _map_statistics(self, branch: Branch, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [S, S] of the branch's maps [B, S, S], on their device."""
        key = branch.name, maps.shape[-1], maps.device
        if key not in self._fields:
            fields = map_statistics(branch.calibration, branch.image_size, maps.shape[-1])
            self._fields[key] = tuple(field.to(maps.device) for field in fields)
        return self._fields[key]


def _standardized(values: Tensor, branch: Branch, statistic: str) -> Tensor:
    return (values - branch.calibration[f"{statistic}_mean"]) / branch.calibration[f"{statistic}_std"]


def _doubted(values: Tensor, images: int) -> Tensor:
    """Standardised values, had the true mean and deviation been `DOUBT` standard errors above those found."""
    return (values - DOUBT / math.sqrt(images)) / (1 + DOUBT / math.sqrt(2 * images))
