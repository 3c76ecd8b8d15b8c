"""Figures of the pixels, exact on raw maps: nothing is clamped or rescaled.

AUROC, AP, F1-max   as scikit-learn defines them, ties included, over all thresholds
AUPRO               Bergmann et al. 2021: overlap averaged over the defect regions of all images, against the false
                    positive rate over the background of all images (normal ones too), integrated up to FPR 0.3 and
                    divided by 0.3; every distinct score is a threshold
PRO as published    the USAD authors' own protocol (published_pro.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import numpy as np

from metrics.metric import Metric
from metrics.published_pro import PublishedPro, region_areas
from metrics.ranking import Ranking, Step, count_at, roc_knots

FPR_LIMIT = 0.3
CHUNK = 1 << 15  # region pixels ranked at a time: few enough for the processor's cache
CURVE_POINTS = 400  # of a curve that is drawn


class PixelMetrics(Metric):
    """Pixel metrics of a test set that arrives in batches; 4 bytes a pixel and 8 more a defect pixel.

    Shards of a test set are combined by `merge(other.state())`.
    """

    protocols: ClassVar[dict[str, str]] = {
        "pixel_auroc": "pixel AUROC, all test pixels",
        "pixel_ap": "pixel average precision",
        "pixel_f1_max": "pixel F1, best threshold",
        "aupro": "AUPRO, all images, exact thresholds, FPR limit 0.3",
        "pro_as_published": "PRO, the authors' protocol (anomalous images, maps scaled one by one)",
    }

    needs_masks = True

    def __init__(self) -> None:
        self._scores = _Buffer(np.float32)  # of all pixels
        self._regions = _Buffer(np.int64)  # score and region area of defect pixels, see _pack
        self._n_images = self._n_regions = 0
        self._published = PublishedPro()
        self._sorted = False

    def update(
        self,
        maps: np.ndarray,
        masks: np.ndarray,
        anomalous: np.ndarray,
        scores: np.ndarray | None = None,
        inside: np.ndarray | None = None,
    ) -> None:
        """Add anomaly maps [B, H, W] (float32), defect masks [B, H, W] (bool) and image labels [B] (bool).

        Image scores play no part.

        Arrays or CPU tensors; other number types are rounded to float32. An anomalous image with an empty
        mask has no region; all its pixels are background. Raises ValueError, and adds nothing, on shapes that
        do not fit, on a map that is not finite, and on a normal image whose mask marks a defect.
        """
        maps, masks = np.asarray(maps, np.float32), np.asarray(masks, bool)
        anomalous = np.asarray(anomalous, bool)
        if maps.ndim != 3 or maps.shape != masks.shape or maps.shape[:1] != anomalous.shape:
            shapes = f"maps {maps.shape}, masks {masks.shape}, labels {anomalous.shape}"
            raise ValueError(f"{shapes} do not fit together")
        for i, (pixels, mask, is_anomalous) in enumerate(zip(maps, masks, anomalous, strict=True)):
            if not np.isfinite(pixels).all():
                raise ValueError(f"the anomaly map of image {self._n_images + i} is not finite")
            if mask.any() and not is_anomalous:
                raise ValueError(f"image {self._n_images + i} is labelled normal but its mask marks a defect")
        masks = masks if inside is None else masks & inside
        for pixels, mask, is_anomalous in zip(maps, masks, anomalous, strict=True):
            areas, n_regions = region_areas(mask)
            if inside is not None:
                pixels, mask = pixels[inside], mask[inside]
            self._scores.append(pixels.ravel())
            self._regions.append(_pack(pixels[mask], areas))
            self._n_regions += n_regions
            if is_anomalous:
                self._published.update(pixels, mask, areas, n_regions)
        self._n_images += len(maps)
        self._sorted = False

    def compute(self) -> dict[str, float | None]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro` and `pro_as_published` of what was added so far.

        All are None without a defect region or without a background pixel; for the last, see `PublishedPro`.
        """
        n_background = self._scores.size - self._regions.size
        ranking = Ranking(self._regions.size, n_background)
        aupro = None
        if ranking.defined:
            area, end = 0.0, np.zeros(2)
            for step, overlap in self._steps():
                ranking.add(step)
                knots = roc_knots(step.fp_above / n_background, step.fp / n_background, overlap, end)
                area, end = area + _area_below(knots, FPR_LIMIT), knots[:, -1]
            # Below the lowest region score every region is found and only the false positives still grow.
            aupro = (area + max(0.0, FPR_LIMIT - float(end[0]))) / FPR_LIMIT
        figures = {f"pixel_{name}": value for name, value in ranking.result().items()}
        return {**figures, "aupro": aupro, "pro_as_published": self._published.compute()}

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = self.points(CURVE_POINTS)
        return {f"pixel_{name}": tuple(values.values()) for name, values in found.items()}

    def points(self, max_points: int = 1000) -> dict[str, dict[str, np.ndarray]]:
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
            roc.append(_thin_rising(roc_knots(fpr_above, fpr, recall, roc_end), max_points))
            pro.append(_thin_rising(roc_knots(fpr_above, fpr, overlap, pro_end), max_points))
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
        """The threshold of the highest F1 (a score at or above it is defect); None where F1 is undefined."""
        ranking = Ranking(self._regions.size, self._scores.size - self._regions.size)
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

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
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

    def _steps(self) -> Iterator[tuple[Step, np.ndarray]]:
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
            yield count_at(scores[first], np.diff(first, append=stop - start), start, everything), overlaps
            start, overlap = stop, float(overlaps[-1])


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
    """Of points [2, K], the first in each equal bin of their rising `position` [K] (0 to 1), and the last point."""
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
    """A vector that grows in place, so that a large test set is never held twice."""

    def __init__(self, dtype: type) -> None:
        self._bytes, self._dtype = bytearray(), np.dtype(dtype)

    @property
    def size(self) -> int:
        return len(self._bytes) // self._dtype.itemsize

    def append(self, values: np.ndarray) -> None:
        """Add elements; raises BufferError while a view from `values` is in use."""
        self._bytes += np.ascontiguousarray(values, self._dtype).data.cast("B")

    def values(self) -> np.ndarray:
        """The elements, as a view."""
        return np.frombuffer(self._bytes, self._dtype)
