"""Figures of the image scores, as scikit-learn defines them, over all thresholds, ties included."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from metrics.metric import Metric
from metrics.ranking import CURVE_POINTS, Curve, Ranking, count_at, curves, spread


class ImageMetrics(Metric):
    """AUROC, average precision and F1 of the image scores of a test set that arrives in batches."""

    protocols: ClassVar[dict[str, str]] = {
        "image_auroc": "image AUROC",
        "image_ap": "image average precision",
        "image_f1_max": "image F1, best threshold",
    }

    def __init__(self) -> None:
        self._scores, self._labels = np.zeros(0), np.zeros(0, bool)

    def update(self, maps: Any, masks: Any, anomalous: np.ndarray, scores: np.ndarray, inside: Any = None) -> None:
        self._scores = np.append(self._scores, scores)
        self._labels = np.append(self._labels, anomalous)

    def compute(self) -> dict[str, float | None]:
        return {f"image_{name}": value for name, value in self._ranking().result().items()}

    def curves(self) -> dict[str, Curve]:
        if not self._ranking().defined:
            return {}
        everything, positives = np.sort(self._scores), np.sort(self._scores[self._labels])
        chosen = [scores[spread(scores.size, CURVE_POINTS // 2)] for scores in (everything, positives)]
        thresholds = np.unique(np.concatenate(chosen))[::-1]
        tp = positives.size - np.searchsorted(positives, thresholds, side="left")
        found = curves(thresholds, tp, np.isin(thresholds, positives), positives.size, everything)
        return {f"image_{name}": points for name, points in found.items()}

    def f1_threshold(self) -> float | None:
        """The threshold of the highest F1 (scores at or above it are anomalous); None if a class is missing."""
        return self._ranking().f1_threshold

    def state(self) -> dict[str, np.ndarray]:
        return {"scores": self._scores, "labels": self._labels}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        self._scores = np.append(self._scores, state["scores"])
        self._labels = np.append(self._labels, np.asarray(state["labels"], bool))

    def _ranking(self) -> Ranking:
        ranking = Ranking(int(self._labels.sum()), int((~self._labels).sum()))
        if ranking.defined:
            distinct, count = np.unique(self._scores[self._labels], return_counts=True)
            ranking.add(count_at(distinct[::-1], count[::-1], 0, np.sort(self._scores)))
        return ranking
