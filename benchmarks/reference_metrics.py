"""Pixel metrics in the plain, published way: lists of floats, and every threshold applied to every image."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from sklearn.metrics import roc_auc_score

THRESHOLDS, FPR_LIMIT = 200, 0.3


def pixel_auroc(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray]) -> float:
    """AUROC over all pixels, each a Python number in a list."""
    scores: list[float] = []
    labels: list[int] = []
    for scores_of_map, mask in zip(maps, masks, strict=True):
        scores.extend(scores_of_map.ravel().tolist())
        labels.extend(mask.ravel().astype(int).tolist())
    return float(roc_auc_score(labels, scores))


def pro_curve(maps: np.ndarray, masks: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FPR and mean overlap of all regions, pixels above each threshold counting as found."""
    regions = []
    for mask in masks:
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions.append([labels == number for number in range(1, count)])
    rates, overlaps = [], []
    for threshold in thresholds:
        false, background, overlap = 0, 0, []
        for scores, mask, own in zip(maps, masks, regions, strict=True):
            found = scores > threshold
            overlap += [(found & region).sum() / region.sum() for region in own]
            false += (found & ~mask).sum()
            background += (~mask).sum()
        rates.append(false / background)
        overlaps.append(np.mean(overlap))
    return np.array(rates), np.array(overlaps)


def pro_as_published(maps: np.ndarray, masks: np.ndarray) -> float:
    """The authors' own protocol on anomalous images: maps scaled one by one, 256 levels, 200 thresholds."""
    maps = maps.astype(np.float64)
    low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
    levels = np.floor(255.0 * ((maps - low) / (high - low + 1e-8))) / 255
    thresholds = np.linspace(levels.min(), levels.max(), THRESHOLDS, endpoint=False)
    rates, overlaps = pro_curve(levels, masks, thresholds)
    kept = rates < FPR_LIMIT
    return _area(rates[kept][::-1], overlaps[kept][::-1]) / float(rates[kept].max())


def aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """AUPRO up to FPR 0.3 from 200 thresholds: an approximation, where the project's is exact."""
    thresholds = np.linspace(maps.max(), maps.min(), THRESHOLDS)
    rates, overlaps = pro_curve(maps, masks, thresholds)
    at_limit = np.interp(FPR_LIMIT, rates, overlaps)
    kept = rates < FPR_LIMIT
    return _area(np.append(rates[kept], FPR_LIMIT), np.append(overlaps[kept], at_limit)) / FPR_LIMIT


def _area(x: np.ndarray, y: np.ndarray) -> float:
    """Area below a polyline, by trapezoids."""
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2)
