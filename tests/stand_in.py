"""What tests of a branch put in the places of a network and of a loader, and how they compare."""

import types

import numpy as np
import torch
from torch import nn

from datasets.loading import IMAGENET_MEAN, IMAGENET_STD


class StandIn(nn.Module):
    """A "network" whose output is its input: tests feed stored tokens or layer maps straight to a branch."""

    def __init__(self, image_size: int, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.spec = types.SimpleNamespace(image_size=image_size)
        self.grid, self.dim, self.neighborhood = grid, dim, 3
        self.device = torch.device("cpu")

    def forward(self, features):
        return features

    def check_finite(self):
        """Stored numbers are."""

    def pixels(self, features):
        """Images of many colours."""
        return torch.rand(len(features[0] if isinstance(features, tuple) else features), 3, 8, 8)


class Batches(list):
    """A loader: batches, and a dataset of known length."""

    def __init__(self, batches, images: int) -> None:
        super().__init__(batches)
        self.dataset = range(images)

    @classmethod
    def of(cls, images: torch.Tensor, batch_size: int = 8):
        """Of images, or of stored features [n, ...] in their place."""
        index = torch.arange(len(images)).split(batch_size)
        return cls([{"image": images[part], "index": part} for part in index], len(images))


def noise(size: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    """Images [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as networks take them."""
    return (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def close(ours, theirs, tolerance: float = 1e-5) -> bool:
    """Whether no number differs by more than `tolerance` of the largest one."""
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (ours, theirs))
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
