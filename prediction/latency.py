"""How long a frame takes from being read to its row, over any number of frames."""

from __future__ import annotations

import math
from collections import Counter

STEP = math.log(1.01)  # bins are 1 % wide
SHARES = {"p50": 0.5, "p99": 0.99}


class Latency:
    """Percentiles to within 1 %, in memory that does not grow: frames are counted in bins of the logarithm."""

    def __init__(self) -> None:
        self.frames = 0
        self._bins: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Take in one frame."""
        self.frames += 1
        self._bins[round(math.log(max(seconds, 1e-6)) / STEP)] += 1

    def figures(self) -> dict[str, float] | None:
        """p50 and p99 in milliseconds; None without frames."""
        return (
            {name: round(1000 * self._percentile(share), 3) for name, share in SHARES.items()} if self.frames else None
        )

    def words(self) -> str:
        """The same for people; empty without frames."""
        return ", ".join(f"{name} {value:.3g} ms" for name, value in (self.figures() or {}).items())

    def _percentile(self, share: float) -> float:
        """Seconds that a `share` of the frames does not exceed."""
        wanted, counted = math.ceil(share * self.frames), 0
        for step, count in sorted(self._bins.items()):
            counted += count
            if counted >= wanted:
                return math.exp(step * STEP)
        return 0.0
