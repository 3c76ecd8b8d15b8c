"""Proof that an exported model predicts what its original does, frame by frame."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from datasets.mvtec import Sample
from metrics.image import image_metrics
from models.fusion.prediction import Model, Prediction
from utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a frame's prediction may lie from the original's."""

    score: float  # relative to the score
    map: float  # relative to the range of the frame's map


@dataclasses.dataclass(frozen=True)
class Judged:
    """What thresholds are compared with: a frame's score, and the highest value of its map."""

    score: float
    peak: float

    @classmethod
    def of(cls, prediction: Prediction) -> Judged:
        return cls(prediction.score, float(prediction.map.max()))


@dataclasses.dataclass
class Proof:
    """What was found on the frames looked at so far: the largest differences, and seconds in all."""

    frames: int = 0
    score: float = 0.0
    map: float = 0.0
    worst: float = 0.0  # the largest difference, in tolerances
    seconds: float = 0.0
    seconds_of_original: float = 0.0
    pairs: list[tuple[Sample, Judged, Judged]] = dataclasses.field(default_factory=list)  # by the original, exported

    def figures(self) -> dict[str, Any]:
        """For the metadata, as plain JSON values."""
        return {"frames": self.frames, "score_difference": self.score, "map_difference": self.map}


def prove(original: Model, exported: Model, samples: Iterable[Sample], tolerance: Tolerance) -> Proof:
    """Compare the two on each frame. Raises InputError, naming the worst, unless all agree within the tolerance."""
    proof, worst = Proof(), None
    for sample in samples:
        picture = sample.read()
        start = time.perf_counter()
        (expected,) = original([picture])
        middle = time.perf_counter()
        (found,) = exported([picture])
        end = time.perf_counter()
        if proof.frames:  # the first one warms up
            proof.seconds_of_original += middle - start
            proof.seconds += end - middle
        score, map_ = score_difference(expected, found), map_difference(expected, found)
        excess = max(score / tolerance.score, map_ / tolerance.map)
        proof.frames += 1
        proof.score, proof.map = max(proof.score, score), max(proof.map, map_)
        if worst is None or excess > proof.worst:
            proof.worst, worst = excess, f"{sample.path}: score {found.score:.6g}, by PyTorch {expected.score:.6g}"
            worst += f"; maps differ by {map_:.2g} of their range"
        proof.pairs.append((sample, Judged.of(expected), Judged.of(found)))
    if proof.worst > 1:
        raise InputError(
            f"the exported model does not agree with PyTorch (scores to {tolerance.score:g}, maps to {tolerance.map:g} "
            f"of their range); worst is {worst}; nothing was written"
        )
    return proof


def score_difference(expected: Prediction, found: Prediction) -> float:
    """Relative to the expected score."""
    return abs(found.score - expected.score) / max(abs(expected.score), 1e-6)


def map_difference(expected: Prediction, found: Prediction) -> float:
    """The largest, relative to the range of the expected map."""
    span = float(np.ptp(expected.map))
    least = 1e-6 * float(np.abs(expected.map).max()) + 1e-12  # of a map that is flat but for rounding
    return float(np.abs(found.map - expected.map).max()) / max(span, least)


def settle_thresholds(
    original: Model, exported: Model, pairs: list[tuple[Sample, Judged, Judged]], rounding: float
) -> None:
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
        quiet = [getattr(found, of) for _, expected, found in pairs if getattr(expected, of) < alarm]
        above = float(np.nextafter(max(quiet, default=-np.inf), np.inf, dtype=np.float32 if of == "peak" else float))
        raised = max(limit, above)
        setattr(exported, name, raised)
        if exported.operating_point:
            exported.operating_point = dataclasses.replace(exported.operating_point, **{name: raised})
        for sample, expected, found in pairs:
            if (getattr(found, of) >= raised) != (getattr(expected, of) >= alarm):
                raise InputError(
                    f"the exported model and PyTorch disagree about an alarm: {sample.path}, {of} "
                    f"{getattr(found, of):.9g}, by PyTorch {getattr(expected, of):.9g}; nothing was written"
                )


def image_auroc(model: Model, samples: Iterable[Sample]) -> float | None:
    """Of the model's scores; None if there are no normal or no anomalous images."""
    scores, labels = zip(*((model([sample.read()])[0].score, sample.label) for sample in samples), strict=True)
    return image_metrics(np.array(scores), np.array(labels))["image_auroc"]
