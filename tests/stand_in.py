"""What tests of a branch put in the places of a network and of a loader."""

from __future__ import annotations

import types

import torch
from torch import nn


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
