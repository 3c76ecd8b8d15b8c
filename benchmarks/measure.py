"""How things are timed: ours and the reference in turn, warmed up, the GPU waited for on both sides."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.networks.kernels import linear


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


def pair(ours: Callable[[], Any], reference: Callable[[], Any] | None, rounds: int = 3) -> tuple[Any, ...]:
    """Both timed in turn after a warm-up: (seconds, seconds or None, result, result or None). Seconds are medians."""
    sides = [work for work in (ours, reference) if work is not None]
    results = [work() for work in sides]
    times = [[seconds(work)[0] for work in sides] for _ in range(rounds)]
    nothing = [None] * (2 - len(sides))
    return (*map(statistics.median, zip(*times, strict=True)), *nothing, *results, *nothing)


def difference(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    expected = expected.to(ours.device)
    return float((ours - expected).abs().max() / expected.abs().max())


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


def gflop(net: torch.nn.Module, images: Tensor) -> float:
    """10^9 floating-point operations of one pass, multiplications and additions counted apart.

    `net` is one whose layers torch counts: not yet with kernels of its own.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    return counter.get_total_flops() / 1e9
