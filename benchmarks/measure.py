"""How things are timed: in pairs, warmed up, synchronised; peak memory in a process of its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.networks.kernels import linear
from utils.machine import peak_memory_mb

LONG = 5.0  # seconds from which on one timed run is enough
VERY_LONG = 60.0  # seconds from which on a run warms itself up


@dataclasses.dataclass
class Row:
    """One size of one stage; seconds are medians, None where a side was not run."""

    stage: str
    size: int
    unit: str
    ours: float | None
    reference: float | None = None
    against: str = ""  # what the reference is
    agreement: str = ""  # how near the two results are
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times as long the reference takes."""
        return self.reference / self.ours if self.ours and self.reference else None


def synchronize() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and what it gave."""
    synchronize()
    start = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - start, result


def pair(ours: Callable[[], Any], reference: Callable[[], Any] | None, repeats: int = 3) -> tuple[Any, ...]:
    """Time both in turn, after a warm-up round: (seconds, seconds or None, result, result or None).

    A side whose warm-up takes longer than `LONG` is timed once more; longer than `VERY_LONG`, it is not run again.
    """
    sides = [work for work in (ours, reference) if work is not None]
    first, results = zip(*(seconds(work) for work in sides), strict=True)
    results = [*results, *[None] * (2 - len(sides))]
    rounds = [repeats if took < LONG else 1 if took < VERY_LONG else 0 for took in first]
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(max(rounds)):
        for number, work in enumerate(sides):
            if turn < rounds[number]:
                took, results[number] = seconds(work)
                times[number].append(took)
    times = [side or [took] for side, took in zip(times, first, strict=True)]
    medians = [statistics.median(side) for side in times]
    return (*medians, *[None] * (2 - len(medians)), *results)


def apart(work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Run `work` in a fresh process: (seconds, MB by which its peak memory grew, result).

    Raises RuntimeError where that process fails.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    settings = multiprocessing.get_start_method(), torch.get_num_threads()
    process = context.Process(target=_child, args=(sender, *settings, work, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} ended with code {process.exitcode}") from None
    finally:
        process.join()


def _child(sender: Any, start_method: str, threads: int, work: Callable[..., Any], arguments: tuple) -> None:
    multiprocessing.set_start_method(start_method, force=True)  # else its loaders' workers would be spawned, too
    torch.set_num_threads(threads)
    before = peak_memory_mb()["host"]
    took, result = seconds(lambda: work(*arguments))
    sender.send((took, peak_memory_mb()["host"] - before, result))


def product_rate(device: str, precision: str, size: int = 4096) -> dict[str, float]:
    """GFLOP/s of square matrix products, by kernel: torch's own, and the one that the project takes in float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    kernels = {"torch.mm": lambda: a @ b}
    if dtype == torch.float32:
        kernels["models.networks.kernels.linear"] = lambda: linear(a, b)
    rates = {}
    for name, kernel in kernels.items():
        kernel()
        rates[name] = 2 * size**3 / min(seconds(kernel)[0] for _ in range(5)) / 1e9
    return rates


def gflop(net: torch.nn.Module, images: torch.Tensor) -> float:
    """10^9 floating-point operations of one pass, multiplications and additions counted apart.

    `net` is one whose layers torch counts: not yet with kernels of its own.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    return counter.get_total_flops() / 1e9
