"""A fusion for small data sets, in which the raw scales of the branches mean little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.branches.branch import Branch, Part
from models.branches.postprocess import mean_of_top
from models.fusion.rule import FusionRule
from utils.errors import InputError


class Standardized(FusionRule):
    """Everything in standard deviations of held-out normal images.

    For each branch the score, the map, and the mean of the map's highest hundredth (its top) are standardised. M is
    the mean of the maps and t that of the tops, weighted by the branches' `map_weight` (PatchCore 8, the others 1). s
    combines t and the scores as Fisher combines tests: √(-2 Σ log p), where p is the chance that a normal image has a
    higher value, under a normal distribution. A normal image scores about 3; a very strange one scores the root of its
    summed squared deviations.
    """

    name = "standardized"

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__(branches)
        self.statistics = {branch.name: branch.calibration for branch in branches}
        total = sum(branch.map_weight for branch in branches)
        self.map_weights = {branch.name: branch.map_weight / total for branch in branches}
        missing = [name for name, statistics in self.statistics.items() if statistics is None]
        if missing:
            raise InputError(
                f"--fusion standardized needs held-out statistics, and branch '{missing[0]}' has none; "
                "train the three branches with --holdout-ratio, for instance 0.2"
            )

    def fuse(self, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
        scores, tops, fused = [], 0.0, 0.0
        for name, part in parts.items():
            weight = self.map_weights[name]
            scores.append(self._standardize(part.scores.double(), name, "score"))
            tops = tops + weight * self._standardize(mean_of_top(part.maps).double(), name, "top")
            fused = fused + weight * self._standardize(part.maps, name, "map")
        return (-2 * torch.special.log_ndtr(-torch.stack([*scores, tops])).sum(0)).sqrt(), fused

    def _standardize(self, values: Tensor, name: str, statistic: str) -> Tensor:
        statistics = self.statistics[name]
        return (values - statistics[f"{statistic}_mean"]) / statistics[f"{statistic}_std"]
