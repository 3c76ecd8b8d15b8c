"""Stopwatch for the stages of a run, on the host or on a GPU, which it never waits for while they run."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from utils.machine import cuda_in_use

MOST_LAPS = 256  # before they are added up


class Lap(NamedTuple):
    stage: str
    start: Any  # stamped by the device when it comes to the stage
    end: Any


class Stopwatch:
    """Adds up seconds by stage: the host's or, on a `device` that is a GPU, those of the device itself."""

    def __init__(self, device: Any = "cpu") -> None:
        self.on_gpu = str(device).startswith("cuda")
        self.laps: list[Lap] = []  # not yet added up
        self._seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if not self.on_gpu:
            start = time.perf_counter()
            yield
            self._seconds[stage] += time.perf_counter() - start
            return
        cuda = cuda_in_use()
        captured = cuda.is_current_stream_capturing()  # its time stamps are taken by every replay
        lap = Lap(stage, *(cuda.Event(enable_timing=True, external=captured) for _ in range(2)))
        lap.start.record()
        yield
        lap.end.record()
        self.laps.append(lap)
        if len(self.laps) == MOST_LAPS and not captured:
            self.settle()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage; waits for what still runs."""
        self.settle()
        return self._seconds

    def settle(self) -> None:
        """Add the laps up; waits for what still runs."""
        for lap in self.laps:
            lap.end.synchronize()
            self._seconds[lap.stage] += lap.start.elapsed_time(lap.end) / 1e3
        self.laps.clear()
