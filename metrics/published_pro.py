"""The per-region overlap score as the program of the USAD authors (arXiv 2602.07694) computes it."""

import cv2
import numpy as np

THRESHOLDS = 200
FPR_LIMIT = 0.3


class PublishedPro:
    """The published PRO of the anomalous images added to it.

    Each map is scaled to [0, 1] by its own minimum and maximum and cut to levels floor(255 x). 200 thresholds
    are spaced evenly from the lowest level (included) to the highest (excluded); pixels above one (>) are
    predicted. Overlap is averaged over the 8-connected defect regions of all images, FPR pooled over their
    background, that of images with an empty mask included. Points with FPR < 0.3 are kept, their FPR is
    divided by the largest of them, and the area under PRO is taken by trapezoids.
    """

    def __init__(self) -> None:
        self.background = np.zeros(256, np.int64)  # background pixels at each level
        self.overlap = np.zeros(256)  # share of its region that a pixel makes up, summed at each level
        self.n_regions = 0

    def update(self, scores: np.ndarray, mask: np.ndarray, areas: np.ndarray, n_regions: int) -> None:
        """Add an anomalous image: finite map and mask (bool) of one shape, and the mask's `region_areas`."""
        low, high = float(scores.min()), float(scores.max())
        scaled = np.subtract(scores, low, dtype=np.float64) * 255.0 / ((high - low) or 1.0)
        # The published program adds 1e-8 to the range, so that the maximum ends in level 254 instead of 255. The cap
        # does the same without depending on the unit of the scores.
        levels = np.minimum(scaled, 254.0, out=scaled).astype(np.uint8)
        histogram = cv2.calcHist([levels], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        region_levels = levels[mask]
        self.background += histogram - np.bincount(region_levels, minlength=256)
        self.overlap += np.bincount(region_levels, weights=1.0 / areas, minlength=256)
        self.n_regions += n_regions

    def compute(self) -> float | None:
        """The score, in [0, 1].

        None where the protocol divides by zero or has no curve: no region, no background, fewer than two
        points below the FPR limit, or no false positive at any of them (as with constant maps).
        """
        n_background = int(self.background.sum())
        if not (self.n_regions and n_background):
            return None
        top = int(np.flatnonzero(self.background + self.overlap)[-1])  # the lowest level is 0 in every image
        below = np.arange(THRESHOLDS) * top // THRESHOLDS  # the last level that a threshold leaves out
        fpr = (n_background - np.cumsum(self.background)[below]) / n_background
        pro = 1.0 - np.cumsum(self.overlap)[below] / self.n_regions
        kept = fpr < FPR_LIMIT
        fpr, pro = fpr[kept][::-1], pro[kept][::-1]
        if fpr.size < 2 or fpr[-1] == 0:
            return None
        return float(np.sum(np.diff(fpr) * (pro[1:] + pro[:-1])) / 2 / fpr[-1])


def region_areas(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The 8-connected regions of mask [H, W] (bool).

    Returns, for each defect pixel in row order, the pixels in its region; and the number of regions.
    """
    if not mask.any():
        return np.zeros(0, np.int64), 0
    count, labels = cv2.connectedComponents(np.ascontiguousarray(mask).view(np.uint8), connectivity=8)
    labels = labels[mask]
    return np.bincount(labels)[labels], count - 1
