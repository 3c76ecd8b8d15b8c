"""What a run's flags come to: frozen values, which alone travel further down than the scripts."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where images are read from and results go."""

    root: Path  # holds <category>/train, test, ground_truth
    categories: tuple[str, ...]
    results_dir: Path
    skip_unreadable: bool


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What the networks run on, and who reads the images."""

    device: str
    precision: str
    batch_size: int
    workers: int


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """Which of the training images are fitted on, and which held out."""

    train_ratio: float
    holdout_ratio: float
    seed: int
