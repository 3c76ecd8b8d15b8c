"""Figures of the image scores, as scikit-learn defines them, over all thresholds, ties included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from metrics.metric import Metric
from metrics.ranking import Ranking, Step, count_at, roc_knots


class ImageMetrics(Metric):
    """AUROC, average precision and F1 of the image scores of a test set that arrives in batches."""

    protocols: ClassVar[dict[str, str]] = {
        "image_auroc": "image AUROC",
        "image_ap": "image average precision",
        "image_f1_max": "image F1, best threshold",
    }

    def __init__(self) -> None:
        self._scores, self._labels = np.zeros(0), np.zeros(0, bool)

    def update(
        self,
        maps: np.ndarray,
        masks: np.ndarray,
        anomalous: np.ndarray,
        scores: np.ndarray,
        inside: np.ndarray | None = None,
    ) -> None:
        self._scores = np.append(self._scores, scores)
        self._labels = np.append(self._labels, anomalous)

    def compute(self) -> dict[str, float | None]:
        return image_metrics(self._scores, self._labels)

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = image_curves(self._scores, self._labels)
        return {f"image_{name}": tuple(points.values()) for name, points in found.items()}

    def f1_threshold(self) -> float | None:
        """The threshold of the highest F1 (scores at or above it are anomalous); None if a class is missing."""
        return image_f1_threshold(self._scores, self._labels)

    def state(self) -> dict[str, np.ndarray]:
        return {"scores": self._scores, "labels": self._labels}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self._scores = np.append(self._scores, state["scores"])
        self._labels = np.append(self._labels, np.asarray(state["labels"], bool))


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """`image_auroc`, `image_ap` and `image_f1_max` of scores [n] for labels [n] (0 normal, 1 anomalous).

    All are None if a class is missing. Raises ValueError if a score is NaN or infinite.
    """
    ranking, _ = _rank_images(scores, labels)
    return {f"image_{name}": value for name, value in ranking.result().items()}


def image_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """The threshold of the highest F1 (scores at or above it are anomalous); None if a class is missing."""
    return _rank_images(scores, labels)[0].f1_threshold


def image_curves(scores: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The ROC and precision-recall curves of image scores, in the form of `PixelMetrics.points`, not thinned."""
    ranking, step = _rank_images(scores, labels)
    if step is None:
        return {}
    recall, n_negative = step.tp / ranking.n_positive, ranking.n_negative
    roc = roc_knots(step.fp_above / n_negative, step.fp / n_negative, recall, np.zeros(2))
    roc = np.hstack([roc, np.ones((2, 1))])
    return {
        "roc": {"fpr": roc[0], "tpr": roc[1]},
        "pr": {"recall": recall, "precision": step.tp / (step.tp + step.fp)},
    }


def _rank_images(scores: np.ndarray, labels: np.ndarray) -> tuple[Ranking, Step | None]:
    """Ranks image scores [n]; counts at the distinct scores of anomalous images, None if a class is missing."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} are not two vectors of one length")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of image {np.flatnonzero(~np.isfinite(scores))[0]} is not finite")
    ranking, step = Ranking(int(labels.sum()), int((~labels).sum())), None
    if ranking.defined:
        distinct, count = np.unique(scores[labels], return_counts=True)
        step = count_at(distinct[::-1], count[::-1], 0, np.sort(scores))
        ranking.add(step)
    return ranking, step
