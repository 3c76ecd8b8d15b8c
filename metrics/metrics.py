"""Image and pixel metrics on raw scores: exact, nothing clamped or rescaled.

All figures are fractions; None stands for a figure that is undefined on the data at hand.

    AUROC, AP, F1-max   as scikit-learn defines them, ties included, over all thresholds
    AUPRO               Bergmann et al. 2021: overlap averaged over the defect regions of all images, against
                        the false positive rate over the background of all images (normal ones too),
                        integrated up to FPR 0.3 and divided by 0.3; every distinct score is a threshold
    PRO as published    the USAD authors' own protocol, in published_pro.py

The counts behind them matter only at the scores of positives. So all scores are sorted once and the positives
looked up among them; no threshold is ever applied to an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from metrics.published_pro import PublishedPro, region_areas

FPR_LIMIT = 0.3
PROTOCOLS = {
    "image_auroc": "image AUROC",
    "image_ap": "image average precision",
    "image_f1_max": "image F1, best threshold",
    "pixel_auroc": "pixel AUROC, all test pixels",
    "pixel_ap": "pixel average precision",
    "pixel_f1_max": "pixel F1, best threshold",
    "aupro": "AUPRO, all images, exact thresholds, FPR limit 0.3",
    "pro_as_published": "PRO, the authors' protocol (anomalous images, maps scaled one by one)",
}
CHUNK = 1 << 15  # region pixels ranked at a time: what comes of them stays in the processor's cache


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """`image_auroc`, `image_ap` and `image_f1_max` of scores [n] for labels [n] (0 normal, 1 anomalous).

    All are None if a class is missing. Raises ValueError if a score is NaN or infinite.
    """
    ranking, _ = _rank_images(scores, labels)
    return {f"image_{name}": value for name, value in ranking.result().items()}


def image_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """The score from which on images count as anomalous for the highest F1; None if a class is missing."""
    return _rank_images(scores, labels)[0].f1_threshold


def image_curves(scores: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The ROC and precision-recall curves of image scores, as `PixelMetrics.curves` has them, not thinned."""
    ranking, step = _rank_images(scores, labels)
    if step is None:
        return {}
    recall, n_negative = step.tp / ranking.n_positive, ranking.n_negative
    roc = _knots(step.fp_above / n_negative, step.fp / n_negative, recall, np.zeros(2))
    roc = np.hstack([roc, np.ones((2, 1))])
    return {
        "roc": {"fpr": roc[0], "tpr": roc[1]},
        "pr": {"recall": recall, "precision": step.tp / (step.tp + step.fp)},
    }


class PixelMetrics:
    """Pixel metrics of a test set that arrives in batches; 4 bytes a pixel and 8 more a defect pixel.

    Shards of a test set are combined by `merge(other.state())`.
    """

    def __init__(self) -> None:
        self._scores = _Buffer(np.float32)  # of all pixels
        self._regions = _Buffer(np.int64)  # score and region area of defect pixels, see _pack
        self._n_images = self._n_regions = 0
        self._published = PublishedPro()
        self._sorted = False

    def update(self, maps: np.ndarray, masks: np.ndarray, anomalous: np.ndarray) -> None:
        """Add anomaly maps [B, H, W] (float32), defect masks [B, H, W] (bool) and image labels [B] (bool).

        Arrays or CPU tensors; other number types are rounded to float32. An anomalous image with an empty
        mask has no region; all its pixels are background. Raises ValueError, and adds nothing, on shapes that
        do not fit, on a map that is not finite, and on a normal image whose mask marks a defect.
        """
        maps, masks = np.asarray(maps, np.float32), np.asarray(masks, bool)
        anomalous = np.asarray(anomalous, bool)
        if maps.ndim != 3 or maps.shape != masks.shape or maps.shape[:1] != anomalous.shape:
            shapes = f"maps {maps.shape}, masks {masks.shape}, labels {anomalous.shape}"
            raise ValueError(f"{shapes} do not fit together")
        for i, (scores, mask, is_anomalous) in enumerate(zip(maps, masks, anomalous, strict=True)):
            if not np.isfinite(scores).all():
                raise ValueError(f"the anomaly map of image {self._n_images + i} is not finite")
            if mask.any() and not is_anomalous:
                raise ValueError(f"image {self._n_images + i} is labelled normal but its mask marks a defect")
        for scores, mask, is_anomalous in zip(maps, masks, anomalous, strict=True):
            areas, n_regions = region_areas(mask)
            self._scores.append(scores.ravel())
            self._regions.append(_pack(scores[mask], areas))
            self._n_regions += n_regions
            if is_anomalous:
                self._published.update(scores, mask, areas, n_regions)
        self._n_images += len(maps)
        self._sorted = False

    def compute(self) -> dict[str, float | None]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro` and `pro_as_published` of what was added so far.

        All are None without a defect region or without a background pixel; for the last, see `PublishedPro`.
        """
        n_background = self._scores.size - self._regions.size
        ranking = _Ranking(self._regions.size, n_background)
        aupro = None
        if ranking.defined:
            area, end = 0.0, np.zeros(2)
            for step, overlap in self._steps():
                ranking.add(step)
                knots = _knots(step.fp_above / n_background, step.fp / n_background, overlap, end)
                area, end = area + _area_below(knots, FPR_LIMIT), knots[:, -1]
            # Below the lowest region score every region is found and only the false positives still grow.
            aupro = (area + max(0.0, FPR_LIMIT - float(end[0]))) / FPR_LIMIT
        figures = {f"pixel_{name}": value for name, value in ranking.result().items()}
        return {**figures, "aupro": aupro, "pro_as_published": self._published.compute()}

    def curves(self, max_points: int = 1000) -> dict[str, dict[str, np.ndarray]]:
        """Points of the ROC, precision-recall and PRO curves, at most `max_points` (2 or more) of each.

        {"roc": {"fpr", "tpr"}, "pr": {"recall", "precision"}, "pro": {"fpr", "pro"}}: float64 vectors, from
        the highest threshold to the lowest. The points are exact, thinned evenly along the curve, both ends
        included. Empty if there is no region or no background.
        """
        n_region = self._regions.size
        n_background = self._scores.size - n_region
        if not (n_region and n_background):
            return {}
        roc, pr, pro = [], [], []
        roc_end = pro_end = np.zeros(2)
        for step, overlap in self._steps():
            fpr_above, fpr, recall = step.fp_above / n_background, step.fp / n_background, step.tp / n_region
            roc.append(_thin_rising(_knots(fpr_above, fpr, recall, roc_end), max_points))
            pro.append(_thin_rising(_knots(fpr_above, fpr, overlap, pro_end), max_points))
            pr.append(_thin(np.stack([recall, step.tp / (step.tp + step.fp)]), recall, max_points))
            roc_end, pro_end = roc[-1][:, -1], pro[-1][:, -1]
        corner = np.ones((2, 1))
        roc, pro = (_thin_rising(np.hstack([*points, corner]), max_points) for points in (roc, pro))
        pr = np.hstack(pr)
        pr = _thin(pr, pr[0], max_points)
        return {
            "roc": {"fpr": roc[0], "tpr": roc[1]},
            "pr": {"recall": pr[0], "precision": pr[1]},
            "pro": {"fpr": pro[0], "pro": pro[1]},
        }

    def f1_threshold(self) -> float | None:
        """The score from which on pixels count as defect for the highest F1; None where F1 is undefined."""
        ranking = _Ranking(self._regions.size, self._scores.size - self._regions.size)
        if ranking.defined:
            for step, _ in self._steps():
                ranking.add(step)
        return ranking.f1_threshold

    def state(self) -> dict[str, np.ndarray]:
        """What was added so far as plain arrays (copies), to be stored or sent to another process."""
        return {
            "scores": self._scores.values().copy(),
            "regions": self._regions.values().copy(),
            "counts": np.array([self._n_images, self._n_regions]),
            "published_background": self._published.background.copy(),
            "published_overlap": self._published.overlap.copy(),
        }

    def merge(self, state: dict[str, np.ndarray]) -> None:
        """Add the images of another PixelMetrics, given its `state()`, as arrays or CPU tensors."""
        arrays = {name: np.asarray(values) for name, values in state.items()}
        n_images, n_regions = (int(n) for n in arrays["counts"])
        self._scores.append(arrays["scores"])
        self._regions.append(arrays["regions"])
        self._n_images += n_images
        self._n_regions += n_regions
        self._published.background += arrays["published_background"]
        self._published.overlap += arrays["published_overlap"]
        self._published.n_regions += n_regions
        self._sorted = False

    def _steps(self) -> Iterator[tuple[_Step, np.ndarray]]:
        """Yield counts at the distinct region scores, highest first, and the mean overlap [K] there."""
        everything, keys = self._scores.values(), self._regions.values()
        if not self._sorted:
            everything.sort()
            keys.sort()
            self._sorted = True
        start, overlap = 0, 0.0
        while start < keys.size:
            last_rank = keys[min(start + CHUNK, keys.size) - 1] >> 32
            stop = int(np.searchsorted(keys, (last_rank + 1) << 32))  # never between tied scores
            scores, areas = _unpack(keys[start:stop])
            first = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
            gains = np.add.reduceat(1.0 / areas, first) / self._n_regions
            overlaps = np.minimum(overlap + np.cumsum(gains), 1.0)
            yield _count(scores[first], np.diff(first, append=stop - start), start, everything), overlaps
            start, overlap = stop, float(overlaps[-1])


class _Step(NamedTuple):
    """Counts at a run of distinct scores of positives, highest first; vectors [K]."""

    score: np.ndarray  # the scores; all else are integers
    count: np.ndarray  # positives with this very score
    tp: np.ndarray  # positives with this score or a higher one
    fp_above: np.ndarray  # negatives with a higher score
    fp: np.ndarray  # negatives with this score or a higher one


def _count(scores: np.ndarray, count: np.ndarray, tp_before: int, everything: np.ndarray) -> _Step:
    """Rank falling distinct `scores` [K], of `count` [K] positives each, among all scores [N], rising."""
    tp = tp_before + np.cumsum(count)
    above = everything.size - np.searchsorted(everything, scores, side="right")
    at_or_above = everything.size - np.searchsorted(everything, scores, side="left")
    return _Step(scores, count, tp, above - (tp - count), at_or_above - tp)


class _Ranking:
    """AUROC, AP and F1-max from steps that arrive in descending order of the score."""

    def __init__(self, n_positive: int, n_negative: int) -> None:
        self.n_positive, self.n_negative = n_positive, n_negative
        self.defined = n_positive > 0 and n_negative > 0
        self._twice_area = 0  # in pairs of a positive and a negative: an integer, hence exact
        self._ap = self._f1_max = 0.0
        self.f1_threshold: float | None = None

    def add(self, step: _Step) -> None:
        self._twice_area += int(np.sum(step.count * (2 * self.n_negative - step.fp_above - step.fp)))
        self._ap += float(np.sum(step.count * (step.tp / (step.tp + step.fp)))) / self.n_positive
        f1 = 2 * step.tp / (step.tp + step.fp + self.n_positive)
        best = int(f1.argmax())
        if f1[best] > self._f1_max:
            self._f1_max, self.f1_threshold = float(f1[best]), float(step.score[best])

    def result(self) -> dict[str, float | None]:
        if not self.defined:
            return {"auroc": None, "ap": None, "f1_max": None}
        auroc = self._twice_area / (2 * self.n_positive * self.n_negative)
        return {"auroc": auroc, "ap": self._ap, "f1_max": self._f1_max}


def _rank_images(scores: np.ndarray, labels: np.ndarray) -> tuple[_Ranking, _Step | None]:
    """Image scores [n] ranked; counts at anomalous images' distinct scores, None if a class is missing."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} are not two vectors of one length")
    if not np.isfinite(scores).all():
        raise ValueError(f"the score of image {np.flatnonzero(~np.isfinite(scores))[0]} is not finite")
    ranking, step = _Ranking(int(labels.sum()), int((~labels).sum())), None
    if ranking.defined:
        distinct, count = np.unique(scores[labels], return_counts=True)
        step = _count(distinct[::-1], count[::-1], 0, np.sort(scores))
        ranking.add(step)
    return ranking, step


def _knots(fpr_above: np.ndarray, fpr: np.ndarray, hits: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Corners [2, 1 + 2K] of the curve of `hits` [K] over FPR that continues from the point `start` [2].

    Up to a region score only false positives grow, a level stroke; ties at the score make a sloping one.
    """
    x = np.append(start[0], np.stack([fpr_above, fpr], axis=1))
    y = np.repeat(np.append(start[1], hits), 2)[:-1]
    return np.stack([x, y])


def _area_below(points: np.ndarray, limit: float) -> float:
    """Area under the polyline `points` [2, K] (x rising) for x up to `limit`, where y is interpolated."""
    x, y = points
    inside = int(np.searchsorted(x, limit, side="right"))
    if inside == 0:
        return 0.0
    if inside < x.size:
        x, y = x[: inside + 1].copy(), y[: inside + 1].copy()
        y[-1] = y[-2] + (y[-1] - y[-2]) * (limit - x[-2]) / (x[-1] - x[-2])
        x[-1] = limit
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _thin(points: np.ndarray, position: np.ndarray, max_points: int) -> np.ndarray:
    """The first of points [2, K] in equal bins of their rising `position` [K] (0 to 1), and the last."""
    bins = np.minimum((position * (max_points - 1)).astype(np.int64), max_points - 2)
    kept = np.diff(bins, prepend=-1) != 0
    kept[-1] = True
    return points[:, kept]


def _thin_rising(points: np.ndarray, max_points: int) -> np.ndarray:
    """Thin a curve both of whose coordinates rise from 0 to 1."""
    return _thin(points, points.mean(axis=0), max_points)


def _pack(scores: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Scores (float32) and areas [K] as int64 keys that rise where the scores fall: one sort moves both."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0, with which it ties
    rank = ~_flip_negatives(bits)
    return rank.astype(np.int64) << 32 | areas


def _unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rank = (keys >> 32).astype(np.int32)
    return _flip_negatives(~rank).view(np.float32), keys & 0xFFFFFFFF


def _flip_negatives(bits: np.ndarray) -> np.ndarray:
    """Turn the bits of float32 numbers into int32 numbers of the same order, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


class _Buffer:
    """A vector that grows in place, so that a large test set is not held twice while it does."""

    def __init__(self, dtype: type) -> None:
        self._array = np.empty(0, dtype)
        self.size = 0

    def append(self, values: np.ndarray) -> None:
        end = self.size + values.size
        if end > self._array.size:
            self._array.resize(max(end, self._array.size * 5 // 4), refcheck=False)
        self._array[self.size : end] = values
        self.size = end

    def values(self) -> np.ndarray:
        """The elements, as a view that the next `append` makes invalid."""
        return self._array[: self.size]
