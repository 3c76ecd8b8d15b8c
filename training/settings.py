"""The settings of a run, made from its flags: frozen values, the only form in which flags go further down."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets.images import Decoding


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where images are read from and results go."""

    root: Path  # holds <category>/train, test, ground_truth
    categories: tuple[str, ...]
    results_dir: Path
    skip_unreadable: bool
    decoding: Decoding


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What the networks run on, and how many processes read the images."""

    device: str
    precision: str
    batch_size: int
    workers: int


@dataclasses.dataclass(frozen=True)
class SplitSettings:
    """Which training images are fitted on, and which are held out."""

    train_ratio: float
    holdout_ratio: float
    seed: int
