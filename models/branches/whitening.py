"""Whitening of patch features by the covariance of the training patches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.branches.gaussian import RunningMoments
from utils.checkpoint import take

FLOOR = 1e-2  # added to the eigenvalues of the correlation matrix: what hardly varies is not amplified to noise
ROUNDING = 1e-5  # of the largest deviation of all channels: what varies less is rounding
SILENT = 0.02  # of the largest of its map: a channel that few patches excite is no measure for others
PREFIX = "aligned_"  # of its tensors in a checkpoint: a bank of patches that were not aligned has another
ROWS = 1 << 16  # patches at a time


class Whitening:
    """Patch features [..., D] -> (features - mean) @ matrix, with unit covariance except for the floor.

    Features made of several maps are whitened map by map, so that each counts the same in a distance.
    """

    def __init__(self, mean: Tensor, matrix: Tensor, moments: Mapping[str, Tensor] | None = None) -> None:
        self.moments = dict(moments or {})  # of the patches, as `RunningMoments.state` gives them, with the noise
        self.mean = mean.float()
        self.matrix = matrix.float()

    @classmethod
    def fit(
        cls,
        patches: Tensor,
        widths: Sequence[int],
        noise: Tensor | float = 0.0,
        share: float = 1.0,
        before: Whitening | None = None,
    ) -> Whitening:
        """From training patches [n, D] whose D channels are maps of `widths` channels side by side.

        `noise` [D, D] is added to their covariance. Each patch stands for a `share` of them, beside those of `before`.
        """
        moments = RunningMoments()
        for rows in patches.split(ROWS):
            moments.update(rows)
        moments.repeat(share)
        moments.scatter = moments.scatter + moments.count * noise
        moments.merge(before.moments if before else {})
        covariance = moments.scatter / moments.count
        deviations = covariance.diagonal().sqrt()
        rounding = (ROUNDING * deviations.max()).clamp(min=1e-6)
        matrix = torch.zeros_like(covariance)
        for width, end in zip(widths, itertools.accumulate(widths), strict=True):
            block = slice(end - width, end)
            deviation = deviations[block].clamp(min=(SILENT * deviations[block].max()).maximum(rounding))
            correlation = covariance[block, block] / torch.outer(deviation, deviation)
            correlation.fill_diagonal_(1)  # as if silent channels varied by what they are divided by
            values, vectors = torch.linalg.eigh(correlation)
            scale = (len(covariance) / (len(widths) * width)) ** 0.5
            matrix[block, block] = scale * vectors / deviation[:, None] / (values.clamp(min=0) + FLOOR).sqrt()
        return cls(moments.mean, matrix, moments.state())

    def to(self, device: torch.device | str) -> Whitening:
        return Whitening(self.mean.to(device), self.matrix.to(device), self.moments)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) @ self.matrix

    def undone(self, whitened: Tensor) -> Tensor:
        """The features [..., D] that were whitened."""
        return (whitened.double() @ self.matrix.double().inverse() + self.mean).float()

    def apply_(self, patches: Tensor) -> None:
        """Whiten patches [n, D] in place, in little memory."""
        for rows in patches.split(ROWS):
            rows.copy_(self(rows))

    def state(self) -> dict[str, Tensor]:
        moments = {"mean": self.mean, **self.moments}
        return {f"{PREFIX}{name}": tensor for name, tensor in {"matrix": self.matrix, **moments}.items()}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], dim: int) -> Whitening:
        """The whitening of a checkpoint; raises InputError where it does not fit features of width `dim`."""
        moments = RunningMoments.taken(tensors, dim, PREFIX)
        return cls(take(tensors, f"{PREFIX}mean", dim), take(tensors, f"{PREFIX}matrix", dim, dim), moments)
