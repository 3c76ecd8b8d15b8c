"""Maps to figures: the PRO as published, and all pixel metrics, beside plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter

from benchmarks import reference_metrics
from benchmarks.measure import Row, pair
from benchmarks.settings import SEED, Settings
from metrics.pixel import PixelMetrics
from metrics.published_pro import PublishedPro, region_areas


def drawn_maps(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth anomaly maps [count, side, side] (float32) that partly find the regions of their masks (bool)."""
    rng = np.random.default_rng(SEED)
    maps, masks = np.empty((count, side, side), np.float32), np.zeros((count, side, side), np.uint8)
    for scores, mask in zip(maps, masks, strict=True):
        for _ in range(rng.integers(1, 4)):
            center = tuple(int(place) for place in rng.integers(side // 8, side - side // 8, 2))
            cv2.circle(mask, center, int(rng.integers(side // 40 + 1, side // 10 + 2)), 1, -1)
        noise = cv2.resize(rng.random((side // 8, side // 8), np.float32), (side, side))
        scores[:] = gaussian_filter(noise + 0.5 * mask * rng.random(), 4)
    return maps, masks > 0


def pixels(settings: Settings, count: int) -> Iterator[Row]:
    """The exact AUPRO and the pixel AUROC come with all other pixel metrics, in one pass over batches of four."""
    maps, masks = drawn_maps(count, 64 if settings.quick else 406)

    def published() -> float | None:
        metric = PublishedPro()
        for scores, mask in zip(maps, masks, strict=True):
            metric.update(scores, mask, *region_areas(mask))
        return metric.compute()

    def exact(name: str) -> float | None:
        metrics = PixelMetrics()
        for start in range(0, count, 4):
            batch = slice(start, start + 4)
            metrics.update(maps[batch], masks[batch], np.ones(len(maps[batch]), bool))
        return metrics.compute()[name]

    thresholds, lists = "200 thresholds on every image", "lists of floats, scikit-learn"
    for name, ours, plain, against in (
        ("pro_as_published", published, reference_metrics.pro_as_published, thresholds),
        ("aupro, all pixel metrics", lambda: exact("aupro"), reference_metrics.aupro, thresholds),
        ("pixel_auroc, all pixel metrics", lambda: exact("pixel_auroc"), reference_metrics.pixel_auroc, lists),
    ):
        took, plain_took, found, expected = pair(ours, lambda plain=plain: plain(maps, masks))
        yield Row(name, count, "maps", took, plain_took, against, f"{found:.6f} against {expected:.6f}")
