"""Shared fixtures: stored numbers of the authors' program, stand-in networks, tiny drawn data."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SMALL_NETWORKS, draw_category, succeed
from torch import nn

DATA = Path(__file__).parent / "data"


def pytest_xdist_auto_num_workers(config) -> int | None:
    """No worker for a single file, which could keep only one busy; otherwise a worker for each core."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


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


@pytest.fixture
def golden():
    return lambda name: np.load(DATA / f"{name}.npz")


@pytest.fixture
def stand_in():
    return StandIn


@pytest.fixture
def batches():
    return Batches


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with data/belt, models/belt (the three branches, with held-out images) and result/belt.

    Tests that change anything work on a copy.
    """
    root = tmp_path_factory.mktemp("trained")
    draw_category(root / "data" / "belt")
    for script in SMALL_NETWORKS:
        succeed(root, script, "--holdout-ratio", 0.25, "--save-maps")
    return root


@pytest.fixture
def workplace(trained, tmp_path) -> Path:
    """A copy of `trained`."""
    return shutil.copytree(trained, tmp_path / "workplace")
