"""The stages that turn maps into figures: the project beside the plain reference, time and memory."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter

from benchmarks import reference_metrics
from benchmarks.measure import Row, apart, pair
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


def pro(settings: Settings, count: int) -> Iterator[Row]:
    """`pro_as_published` and the exact AUPRO of anomalous maps, against 200 thresholds on every image."""
    maps, masks = drawn_maps(count, 64 if settings.quick else 406)

    def published() -> float | None:
        metric = PublishedPro()
        for scores, mask in zip(maps, masks, strict=True):
            metric.update(scores, mask, *region_areas(mask))
        return metric.compute()

    def exact() -> float | None:
        metrics = PixelMetrics()
        metrics.update(maps, masks, np.ones(count, bool))
        return metrics.compute()["aupro"]

    for name, ours, plain in (
        ("pro_as_published", published, reference_metrics.pro_as_published),
        ("aupro, exact, with all pixel metrics", exact, reference_metrics.aupro),
    ):
        took, plain_took, found, expected = pair(ours, lambda plain=plain: plain(maps, masks))
        agreement = f"{found:.5f} against {expected:.5f}"
        yield Row(name, count, "maps", took, plain_took, "200 thresholds on every image", agreement)


def pixel_auroc(settings: Settings, count: int) -> Iterator[Row]:
    """Time and memory of the pixel AUROC, all other pixel metrics included, against lists of floats."""
    side = 64 if settings.quick else 406
    took, memory, found = apart(_our_auroc, count, side)
    plain_took, plain_memory, expected = apart(_plain_auroc, count, side)
    drawing, maps_memory, _ = apart(drawn_maps, count, side)
    yield Row(
        "pixel AUROC, with all pixel metrics",
        count,
        "maps",
        max(took - drawing, 1e-9),
        plain_took - drawing,
        "lists of floats, scikit-learn",
        f"{found:.6f} against {expected:.6f}",
        {"mb_above_maps": memory - maps_memory, "reference_mb_above_maps": plain_memory - maps_memory},
    )


def _our_auroc(count: int, side: int) -> float:
    maps, masks = drawn_maps(count, side)
    metrics = PixelMetrics()
    for start in range(0, count, 4):
        metrics.update(maps[start : start + 4], masks[start : start + 4], np.ones(len(maps[start : start + 4]), bool))
    return metrics.compute()["pixel_auroc"]


def _plain_auroc(count: int, side: int) -> float:
    return reference_metrics.pixel_auroc(*drawn_maps(count, side))
