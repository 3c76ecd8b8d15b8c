"""Shared fixtures: tiny drawn data, and what the scripts make of it."""

import shutil
from pathlib import Path

import pytest
from tiny import SMALL_NETWORKS, draw_category, succeed


def pytest_xdist_auto_num_workers(config) -> int | None:
    """No worker for a single file, which could keep only one busy; otherwise a worker for each core."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


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
