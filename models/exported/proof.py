"""Proof that an exported model predicts what its original does, frame by frame."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from datasets.mvtec import Sample
from models.fusion.prediction import Model, Prediction
from utils.errors import InputError


class Tolerance(NamedTuple):
    """How far a frame's prediction may lie from the original's: the score relative to itself, the map to its range."""

    score: float
    map: float  # the largest difference
    mean: float  # of the map's differences


class Compared(NamedTuple):
    """A frame by the original and by the exported model."""

    sample: Sample
    score: tuple[float, float]
    peak: tuple[float, float]  # the highest value of the map
    difference: Tolerance
    seconds: tuple[float, float]


class Proof(list[Compared]):
    """All frames that were compared."""

    @property
    def worst(self) -> Tolerance:
        return Tolerance(*(max(values) for values in zip(*(frame.difference for frame in self), strict=True)))

    def figures(self) -> dict[str, Any]:
        score, largest, mean = self.worst
        return {"frames": len(self), "score_difference": score, "map_difference": largest, "map_mean_difference": mean}


def prove(original: Model, exported: Model, samples: Iterable[Sample], tolerance: Tolerance) -> Proof:
    """Compare the two on each frame. Raises InputError, naming the worst, unless all agree within the tolerance."""
    proof = Proof()
    for sample in samples:
        picture = sample.read()
        start = time.perf_counter()
        (expected,) = original([picture])
        middle = time.perf_counter()
        (found,) = exported([picture])
        seconds = middle - start, time.perf_counter() - middle
        peak = float(expected.map.max()), float(found.map.max())
        proof.append(Compared(sample, (expected.score, found.score), peak, difference(expected, found), seconds))

    def excess(frame: Compared) -> float:
        return max(own / limit for own, limit in zip(frame.difference, tolerance, strict=True))

    worst = max(proof, key=excess)
    if not excess(worst) <= 1:
        raise InputError(
            f"the exported model does not agree with PyTorch (scores to {tolerance.score:g}, maps to {tolerance.map:g} "
            f"of their range, {tolerance.mean:g} on average); worst is {worst.sample.path}: score "
            f"{worst.score[1]:.6g}, by PyTorch {worst.score[0]:.6g}; maps differ by "
            f"{worst.difference.map:.2g}, {worst.difference.mean:.2g} on average; nothing was written"
        )
    return proof


def difference(expected: Prediction, found: Prediction) -> Tolerance:
    """How far the prediction found lies from the expected one."""
    score = abs(found.score - expected.score) / max(abs(expected.score), 1e-6)
    least = 1e-6 * float(np.abs(expected.map).max()) + 1e-12  # of a map that is flat but for rounding
    span = max(float(np.ptp(expected.map)), least)
    off = np.abs(found.map - expected.map) / span
    return Tolerance(score, float(off.max()), float(off.mean()))


def settle_thresholds(original: Model, exported: Model, proof: Iterable[Compared], rounding: float) -> None:
    """Raise the thresholds of `exported` above all frames that are quiet by the original.

    The thresholds of an operating point lie just above a held-out frame, which rounding, relative, can lift over them,
    even by PyTorch with other batches: so near to a threshold a frame counts as quiet. Raises InputError, naming the
    frame, if there still is an alarm by one of the two alone.
    """
    for name, of in (("threshold", "score"), ("pixel_threshold", "peak")):
        limit = getattr(original, name)
        if limit is None:
            continue
        alarm = limit + rounding * abs(limit)
        frames = [(frame.sample, *getattr(frame, of)) for frame in proof]
        highest = max((found for _, expected, found in frames if expected < alarm), default=-np.inf)
        raised = max(limit, float(np.nextafter(highest, np.inf, dtype=np.float32 if of == "peak" else float)))
        setattr(exported, name, raised)
        if exported.operating_point:
            exported.operating_point = dataclasses.replace(exported.operating_point, **{name: raised})
        for sample, expected, found in frames:
            if (found >= raised) != (expected >= alarm):
                raise InputError(
                    f"the exported model and PyTorch disagree about an alarm: {sample.path}, {of} {found:.9g}, by "
                    f"PyTorch {expected:.9g}; nothing was written"
                )
