"""Thresholds for a given rate of false alarms, from normal images that no branch was fitted on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import InputError
from utils.files import write_json

FILE_NAME = "usad.json"
FORMAT = "usad-operating-point-4"  # thresholds of the third may be of another standardized score
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and their false-alarm rate, which also is that of normal images with any region."""

    threshold: float  # a score at or above it is an alarm
    pixel_threshold: float  # a map at or above it is a region
    false_alarm_rate: float  # as asked for
    images: int  # held-out normal images
    expected_rate: float  # on normal images like the held-out ones
    interval: tuple[float, float]  # contains the true rate with 95 % probability
    fusion: dict[str, Any]  # `USAD.settings`
    checkpoints: dict[str, str]  # file name -> SHA-256

    @property
    def source(self) -> str:
        low, high = self.interval
        return (
            f"{self.images} held-out normal images: expected rate {self.expected_rate:.3g}, "
            f"{CONFIDENCE:.0%} interval {low:.3g} to {high:.3g}"
        )

    @property
    def shortfall(self) -> str | None:
        """One line if there are too few images to promise half to 1.5 times the rate that was asked for, else None."""
        rate = self.false_alarm_rate
        if promises(self.images, rate):
            return None
        low, high = self.interval
        line = (
            f"{self.images} held-out images promise a false-alarm rate between {low:.2g} and {high:.2g} (95 %); for "
            f"{rate / 2:g} to {1.5 * rate:g} it takes {images_to_promise(rate)}"
        )
        if self.expected_rate > rate:
            line += f". The thresholds are their highest values, whose expected rate is {self.expected_rate:.3g}"
        return line

    def on_test(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Recall and false alarms on test images: scores [N], labels [N]; None for a class without images."""
        alarms, anomalous = scores >= self.threshold, labels == 1
        found, false_alarms = int(alarms[anomalous].sum()), int(alarms[~anomalous].sum())
        n_anomalous, n_normal = int(anomalous.sum()), int((~anomalous).sum())
        return {
            **self.figures(),
            "recall": found / n_anomalous if n_anomalous else None,
            "missed": n_anomalous - found,
            "false_alarms": false_alarms,
            "measured_false_alarm_rate": false_alarms / n_normal if n_normal else None,
        }

    def figures(self) -> dict[str, Any]:
        """Thresholds and rates as plain JSON values, without the fusion and the checkpoints."""
        figures = dataclasses.asdict(self)
        del figures["fusion"], figures["checkpoints"]
        return {**figures, "interval": list(self.interval)}

    def write(self, folder: Path) -> None:
        """Write <folder>/usad.json."""
        write_json(folder / FILE_NAME, {"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> OperatingPoint | None:
        """The operating point stored in `folder`, if any; raises InputError for a file of another kind."""
        path = folder / FILE_NAME
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls.from_values(content)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path} is not an operating point of USAD ({error}); move it away and run test_fusion.py "
                "--false-alarm-rate"
            ) from None

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> OperatingPoint:
        """From plain JSON values; raises ValueError, KeyError, TypeError or OverflowError if they are none of its."""
        low, high = map(float, values["interval"])
        point = cls(**values | {"interval": (low, high)})
        numbers = [low, high, *(value for name, value in point.figures().items() if name != "interval")]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
            raise ValueError("figures that are not numbers")
        if not isinstance(point.fusion["fusion"], str):
            raise ValueError("the name of a fusion that is none")
        return point


def find_operating_point(
    scores: np.ndarray, peaks: np.ndarray, false_alarm_rate: float, fusion: dict[str, Any], checkpoints: dict[str, str]
) -> OperatingPoint:
    """The operating point from held-out normal images: their fused scores [N] and the maxima of their maps [N].

    Raises InputError if a number is not finite.
    """
    if not (np.isfinite(scores).all() and np.isfinite(peaks).all()):
        raise InputError("the fused score or map of a held-out image is not finite; check the weights")
    expected, interval = exceedance(len(scores), false_alarm_rate)
    return OperatingPoint(
        threshold=quantile(scores, false_alarm_rate),
        pixel_threshold=quantile(peaks, false_alarm_rate),
        false_alarm_rate=false_alarm_rate,
        images=len(scores),
        expected_rate=expected,
        interval=interval,
        fusion=fusion,
        checkpoints=checkpoints,
    )


def rank(count: int, rate: float) -> int:
    """The rank k (from 1, in rising order of `count` values) just above which the threshold lies.

    A new value of the same kind exceeds the k-th of n with probability (n + 1 - k) / (n + 1), of any distribution.
    This is the smallest k that keeps it at `rate` or less, or the last if there are too few values.
    """
    return min(count, math.ceil((count + 1) * (1 - rate) - 1e-9))


def quantile(values: np.ndarray, rate: float) -> float:
    """The smallest number above the value of rank k, so that this value itself is no alarm."""
    value = np.sort(values)[rank(len(values), rate) - 1]
    return float(np.nextafter(value, np.inf, dtype=values.dtype))


def exceedance(count: int, rate: float) -> tuple[float, tuple[float, float]]:
    """Expected rate of new values above the threshold, and its central 95 % interval.

    Over draws of n values, the rate above the k-th is Beta(n + 1 - k, k) distributed (lower if there are ties).
    """
    from scipy.special import betaincinv

    k = rank(count, rate)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(betaincinv(count + 1 - k, k, p)) for p in (tail, 1 - tail))
    return (count + 1 - k) / (count + 1), (low, high)


def promises(count: int, rate: float) -> bool:
    """Whether the threshold of `count` values has a rate between half and 1.5 times `rate`, with 95 % probability."""
    low, high = exceedance(count, rate)[1]
    return rate / 2 <= low and high <= 1.5 * rate


def images_to_promise(rate: float) -> int:
    """The fewest held-out images that promise `rate`, of those numbers whose expected rate is `rate` itself."""
    return next(count for above in itertools.count(1) if promises(count := math.ceil(above / rate) - 1, rate))
