"""Stopwatch for the stages of a run."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

from utils.machine import cuda_in_use


class Stopwatch:
    """Adds up seconds by stage; waits for the GPU on both sides, so that a stage pays for its own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        _synchronize()
        start = time.perf_counter()
        yield
        _synchronize()
        self.seconds[stage] += time.perf_counter() - start


def _synchronize() -> None:
    if cuda := cuda_in_use():
        cuda.synchronize()
