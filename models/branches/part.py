"""What a branch predicts for a batch of images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.region import RegionOfInterest
from models.branches.postprocess import resize_maps
from models.branches.tiling import Tiling, View


class Part(NamedTuple):
    """Higher is more anomalous. Without `low` and `span` a map enters the paper's product as it is."""

    scores: Tensor  # [B]
    maps: Tensor  # [B, S, S], unscaled
    low: Tensor | None = None  # [B, 1, 1], the lowest value of each map
    span: Tensor | None = None  # [B, 1, 1], and the range, by which the paper scales it

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (float64) and maps (float32) on the host."""
        return self.scores.double().cpu().numpy(), self.maps.float().cpu().numpy()

    def scaled(self) -> Tensor:
        """The maps [B, S, S] on a scale of 0 to 1; all zeros where the range is under 1e-8."""
        if self.low is None:
            return self.maps
        return torch.where(self.span < 1e-8, 0.0, (self.maps - self.low) / self.span.clamp(min=1e-8))

    def inside(self, roi: RegionOfInterest | None) -> Part:
        """The same, but outside the region of interest each map has its lowest value."""
        if roi is None:
            return self
        inside = pixels_inside(roi, self.maps.shape[-1], self.maps.device)
        return self._replace(maps=torch.where(inside, self.maps, self.maps.amin((1, 2), keepdim=True)))

    def resized(self, size: int) -> Part:
        """The same with maps [B, size, size]."""
        return self._replace(maps=resize_maps(self.maps, size))


def joined(parts: Sequence[Part], tiling: Tiling, views: Sequence[View]) -> Part:
    """The parts of the tiles of each view as one of their frames."""

    def of_frames(name: str, best: Callable[..., Tensor]) -> Tensor:
        tiles = [
            best(getattr(part, name).unflatten(0, (-1, len(view.corners))), 1)
            for part, view in zip(parts, views, strict=True)
        ]
        return best(torch.stack(tiles), 0)

    part = Part(of_frames("scores", torch.amax), tiling.joined([part.maps for part in parts], views))
    if parts[0].low is None:
        return part
    parts = [part._replace(span=part.low + part.span) for part in parts]  # the highest value
    low = of_frames("low", torch.amin)
    return part._replace(low=low, span=of_frames("span", torch.amax) - low)


@functools.lru_cache(maxsize=256)  # with tiles there are many regions
def pixels_inside(roi: RegionOfInterest, size: int, device: torch.device) -> Tensor:
    """The region of interest on a square of `size` pixels, bool [size, size]."""
    return torch.from_numpy(roi.at(size, size).copy()).to(device)
