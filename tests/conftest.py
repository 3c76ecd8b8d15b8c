"""Shared fixtures: stored numbers of the authors' program, stand-in networks, tiny drawn data."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

DATA = Path(__file__).parent / "data"


class StandIn(nn.Module):
    """A "network" whose output is its input: tests feed stored tokens or layer maps straight to a branch."""

    def __init__(self, image_size: int, grid: tuple[int, int], dim: int) -> None:
        super().__init__()
        self.spec = types.SimpleNamespace(image_size=image_size)
        self.grid, self.dim = grid, dim
        self.device = torch.device("cpu")

    def forward(self, features):
        return features


class Batches(list):
    """A loader: batches, and a dataset of known length."""

    def __init__(self, batches, images: int) -> None:
        super().__init__(batches)
        self.dataset = range(images)


@pytest.fixture
def golden():
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture
def stand_in():
    return StandIn


@pytest.fixture
def batches():
    return Batches
