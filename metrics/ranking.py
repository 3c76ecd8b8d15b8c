"""Exact counts and curves of a ranking, for image scores and for pixels: positives are looked up among all scores."""

from typing import NamedTuple

import numpy as np

CURVE_POINTS = 400  # of a curve that is drawn
Curve = tuple[np.ndarray, np.ndarray]  # x and y of its points


class Step(NamedTuple):
    """Counts at distinct scores of positives, highest first; vectors [K]."""

    score: np.ndarray  # the scores; all else are integers
    count: np.ndarray  # positives with this very score
    tp: np.ndarray  # positives with this score or a higher one
    fp_above: np.ndarray  # negatives with a higher score
    fp: np.ndarray  # negatives with this score or a higher one


def count_at(scores: np.ndarray, count: np.ndarray, tp_before: int, everything: np.ndarray) -> Step:
    """Rank falling distinct `scores` [K], of `count` [K] positives each, among all scores [N], rising."""
    tp = tp_before + np.cumsum(count)
    above = everything.size - np.searchsorted(everything, scores, side="right")
    at_or_above = everything.size - np.searchsorted(everything, scores, side="left")
    return Step(scores, count, tp, above - (tp - count), at_or_above - tp)


class Ranking:
    """AUROC, AP and F1-max from steps that arrive in descending order of the score."""

    def __init__(self, n_positive: int, n_negative: int) -> None:
        self.n_positive, self.n_negative = n_positive, n_negative
        self.defined = n_positive > 0 and n_negative > 0
        self._twice_area = 0  # in pairs of a positive and a negative: an integer, hence exact
        self._ap = self._f1_max = 0.0
        self.f1_threshold: float | None = None

    def add(self, step: Step) -> None:
        """Add the counts at scores lower than all before."""
        self._twice_area += int(np.sum(step.count * (2 * self.n_negative - step.fp_above - step.fp)))
        self._ap += float(np.sum(step.count * (step.tp / (step.tp + step.fp)))) / self.n_positive
        f1 = 2 * step.tp / (step.tp + step.fp + self.n_positive)
        best = int(f1.argmax())
        if f1[best] > self._f1_max:
            self._f1_max, self.f1_threshold = float(f1[best]), float(step.score[best])

    def result(self) -> dict[str, float | None]:
        """`auroc`, `ap` and `f1_max`; None if a class is missing."""
        if not self.defined:
            return {"auroc": None, "ap": None, "f1_max": None}
        auroc = self._twice_area / (2 * self.n_positive * self.n_negative)
        return {"auroc": auroc, "ap": self._ap, "f1_max": self._f1_max}


def spread(size: int, most: int) -> np.ndarray:
    """At most `most` places in an array of `size`, both ends included, evenly spaced."""
    return np.linspace(0, size - 1, min(most, size)).astype(int)


def curves(
    thresholds: np.ndarray, tp: np.ndarray, own: np.ndarray, n_positive: int, everything: np.ndarray
) -> dict[str, Curve]:
    """The ROC and precision-recall curves from falling thresholds [K], down to the lowest of all scores [N], rising.

    `tp` [K] positives are found by each; precision is best, for its recall, where it is a positive's `own` [K] score.
    """
    fp = everything.size - np.searchsorted(everything, thresholds, side="left") - tp
    recall = tp / n_positive
    roc = np.append(0.0, fp / (everything.size - n_positive)), np.append(0.0, recall)
    precision = (tp / (tp + fp))[own]
    return {"roc": roc, "pr": (np.append(0.0, recall[own]), np.append(precision[:1], precision))}
