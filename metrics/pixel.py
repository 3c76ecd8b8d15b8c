"""Metrics of the pixels, exact on raw maps: nothing is clamped or rescaled. docs/metrics.md defines them."""

from array import array
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from metrics.metric import Metric
from metrics.published_pro import PublishedPro, region_areas
from metrics.ranking import CURVE_POINTS, Curve, Ranking, Step, count_at, curves, spread

FPR_LIMIT = 0.3
CHUNK = 1 << 15  # region pixels ranked at a time: few enough for the processor's cache


class PixelMetrics(Metric):
    """Pixel metrics of a test set that arrives in batches; 4 bytes a pixel and 8 more a defect pixel."""

    protocols: ClassVar[dict[str, str]] = {
        "pixel_auroc": "pixel AUROC, all test pixels",
        "pixel_ap": "pixel average precision",
        "pixel_f1_max": "pixel F1, best threshold",
        "aupro": "AUPRO, all images, exact thresholds, FPR limit 0.3",
        "pro_as_published": "PRO, the authors' protocol (anomalous images, maps scaled one by one)",
    }

    needs_masks = True

    def __init__(self) -> None:
        self._scores = array("f")  # of all pixels
        self._regions = array("q")  # score and region area of defect pixels, see _pack
        self._published = PublishedPro()
        self._is_sorted = False

    def update(
        self, maps: np.ndarray, masks: np.ndarray, anomalous: np.ndarray, scores: Any = None, inside: Any = None
    ) -> None:
        """Maps are finite arrays or CPU tensors [B, H, W], rounded to float32; image scores play no part.

        An anomalous image with an empty mask has no region; all its pixels are background. A normal image's mask is
        empty. Raises ValueError on shapes that do not fit.
        """
        maps, masks = np.asarray(maps, np.float32), np.asarray(masks, bool)
        anomalous = np.asarray(anomalous, bool)
        if maps.ndim != 3 or maps.shape != masks.shape or maps.shape[:1] != anomalous.shape:
            shapes = f"maps {maps.shape}, masks {masks.shape}, labels {anomalous.shape}"
            raise ValueError(f"{shapes} do not fit together")
        masks = masks if inside is None else masks & inside
        for pixels, mask, is_anomalous in zip(maps, masks, anomalous, strict=True):
            areas, n_regions = region_areas(mask)
            if inside is not None:
                pixels, mask = pixels[inside], mask[inside]
            _append(self._scores, pixels)
            _append(self._regions, _pack(pixels[mask], areas))
            if is_anomalous:
                self._published.update(pixels, mask, areas, n_regions)
        self._is_sorted = False

    def compute(self) -> dict[str, float | None]:
        ranking, aupro = self._ranked()
        figures = {f"pixel_{name}": value for name, value in ranking.result().items()}
        return {**figures, "aupro": aupro, "pro_as_published": self._published.compute()}

    def f1_threshold(self) -> float | None:
        """The threshold of the highest F1 (a score at or above it is defect); None where F1 is undefined."""
        return self._ranked()[0].f1_threshold

    def curves(self, points: int = CURVE_POINTS) -> dict[str, Curve]:
        """About `points` exact points of the ROC, precision-recall and PRO curves, evenly over the ranks of pixels."""
        if not 0 < len(self._regions) < len(self._scores):
            return {}
        everything, keys = self._sorted()
        chosen = everything[spread(everything.size, points // 2)], _unpack(keys[spread(keys.size, points // 2)])[0]
        thresholds = np.unique(np.concatenate(chosen))[::-1]
        tp = np.searchsorted(keys, _pack(thresholds, 0) + (1 << 32))
        gains = [np.sum(1.0 / _unpack(keys[start:stop])[1]) for start, stop in pairwise([0, *tp])]
        found = curves(thresholds, tp, np.isin(thresholds, chosen[1]), keys.size, everything)
        overlap = np.minimum(np.append(0.0, np.cumsum(gains)) / self._published.n_regions, 1.0)
        return {**{f"pixel_{name}": curve for name, curve in found.items()}, "pixel_pro": (found["roc"][0], overlap)}

    def state(self) -> dict[str, np.ndarray]:
        return {
            "scores": np.array(self._scores),
            "regions": np.array(self._regions),
            "published_regions": np.array([self._published.n_regions]),
            "published_background": self._published.background.copy(),
            "published_overlap": self._published.overlap.copy(),
        }

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        arrays = {name: np.asarray(values) for name, values in state.items()}
        _append(self._scores, arrays["scores"])
        _append(self._regions, arrays["regions"])
        self._published.background += arrays["published_background"]
        self._published.overlap += arrays["published_overlap"]
        self._published.n_regions += int(arrays["published_regions"].item())
        self._is_sorted = False

    def _ranked(self) -> tuple[Ranking, float | None]:
        """The ranking of the pixels, and AUPRO."""
        n_background = len(self._scores) - len(self._regions)
        ranking = Ranking(len(self._regions), n_background)
        if not ranking.defined:
            return ranking, None
        area, end = 0.0, (0.0, 0.0)
        for step, overlap in self._steps():
            ranking.add(step)
            # Between two region scores only false positives grow (a level stroke); ties give a sloping stroke.
            x = np.append(end[0], np.stack([step.fp_above, step.fp], axis=1) / n_background)
            y = np.repeat(np.append(end[1], overlap), 2)[:-1]
            area, end = area + _area_below(x, y, FPR_LIMIT), (x[-1], y[-1])
        # Below the lowest region score every region is found and only the false positives still grow.
        return ranking, (area + max(0.0, FPR_LIMIT - float(end[0]))) / FPR_LIMIT

    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """All scores, rising, and the defect pixels' keys, rising, whose scores fall."""
        everything, keys = np.frombuffer(self._scores, np.float32), np.frombuffer(self._regions, np.int64)
        if not self._is_sorted:
            everything.sort()
            keys.sort()
            self._is_sorted = True
        return everything, keys

    def _steps(self) -> Iterator[tuple[Step, np.ndarray]]:
        """Yield counts at the distinct region scores, highest first, and the mean overlap [K] there."""
        everything, keys = self._sorted()
        start, overlap = 0, 0.0
        while start < keys.size:
            last_rank = keys[min(start + CHUNK, keys.size) - 1] >> 32
            stop = int(np.searchsorted(keys, (last_rank + 1) << 32))  # never between tied scores
            scores, areas = _unpack(keys[start:stop])
            first = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
            gains = np.add.reduceat(1.0 / areas, first) / self._published.n_regions
            overlaps = np.minimum(overlap + np.cumsum(gains), 1.0)
            yield count_at(scores[first], np.diff(first, append=stop - start), start, everything), overlaps
            start, overlap = stop, float(overlaps[-1])


def _append(store: array, values: np.ndarray) -> None:
    """Add values of the array's own type without a copy; raises BufferError while a view of it is in use."""
    store.frombytes(np.ascontiguousarray(values).data.cast("B"))


def _area_below(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area under the polyline of points x [K] (rising) and y [K] for x up to `limit`, where y is interpolated."""
    end = min(limit, x[-1])
    inside = int(np.searchsorted(x, end, side="right"))
    x, y = np.append(x[:inside], end), np.append(y[:inside], np.interp(end, x, y))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)


def _pack(scores: np.ndarray, areas: np.ndarray | int) -> np.ndarray:
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
