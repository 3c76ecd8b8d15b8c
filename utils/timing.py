"""Stopwatch for the stages of a run, and the process's peak memory."""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


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
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak_resident_kib() -> float:
    # On Linux getrusage counts what the parent process held when it started this one, too.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def peak_memory_mb() -> dict[str, float]:
    """Peak memory of this process and, with CUDA in use, of PyTorch on the GPU, in MB (10^6 bytes)."""
    peak = {}
    with contextlib.suppress(ImportError):  # Windows has no resource module
        peak["host"] = round(_peak_resident_kib() * 1024 / 1e6, 1)
    if torch.cuda.is_initialized():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peak


def processor() -> str:
    """The processor's name; where the system does not tell it, that of its kind."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
