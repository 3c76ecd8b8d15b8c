"""What a test run gathers, batch by batch: scores, pixel metrics, small maps, pictures for the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datasets.images import read_image, read_mask
from datasets.mvtec import Item
from utils.cards import Threshold
from utils.errors import InputError
from utils.gallery import Entry, Gallery, Pictures
from utils.metrics import PixelMetrics, image_curves, image_f1_threshold, image_metrics
from utils.report import Curves
from utils.visualize import thumbnail


class Results:
    """Scores, metrics and small maps of a test run, by part (a branch's name, or `fusion`).

    With `report`, the pictures of a report are kept, too.
    """

    def __init__(self, items: list[Item], report: bool = False) -> None:
        self.items = items
        self.gallery = Gallery(len(items)) if report else None
        self.scores: dict[str, list[np.ndarray]] = {}
        self.pixels: dict[str, PixelMetrics] = {}
        self.thumbnails: list[np.ndarray] = []

    def add(self, parts: dict[str, tuple[torch.Tensor, torch.Tensor]], batch: dict[str, Any]) -> np.ndarray:
        """Take in the parts of a batch, the main one first; returns the main maps [B, S, S]."""
        main, values = None, {}
        for name, (scores, maps) in parts.items():
            scores, maps = scores.double().cpu().numpy(), maps.float().cpu().numpy()
            finite = np.isfinite(scores) & np.isfinite(maps).all((1, 2))
            if not finite.all():
                item = self.items[int(batch["index"][int(np.argmin(finite))])]
                raise InputError(f"{name} gives a score or map that is not finite on {item.path}; check the weights")
            self.scores.setdefault(name, []).append(scores)
            self.pixels.setdefault(name, PixelMetrics()).update(
                maps, batch["mask"].numpy(), batch["label"].numpy() == 1
            )
            main = maps if main is None else main
            values[name] = scores, maps
        self.thumbnails.extend(thumbnail(image) for image in main)
        if self.gallery is not None:
            for row, index in enumerate(batch["index"]):
                self._keep(self.items[int(index)], {name: (s[row], m[row]) for name, (s, m) in values.items()})
        return main

    def _keep(self, item: Item, parts: dict[str, tuple[float, np.ndarray]]) -> None:
        def pictures() -> Pictures:
            image = read_image(item.path)
            truth = None if item.mask is None else np.asarray(read_mask(item.mask, image.size)) >= 128
            return Pictures(np.asarray(image), {name: part for name, (_, part) in parts.items()}, truth)

        scores = {name: float(score) for name, (score, _) in parts.items()}
        self.gallery.add(Entry(item.name, scores, item.label, item.path.parent.name), pictures)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """By part: every figure of metrics.json; a figure that is undefined is None."""
        labels = np.array([item.label for item in self.items])
        counts = {"n_images": len(labels), "n_anomalous": int(labels.sum())}
        return {
            name: {
                **image_metrics(np.concatenate(scores), labels),
                **self.pixels[name].compute(),
                **counts,
            }
            for name, scores in self.scores.items()
        }

    def curves(self) -> Curves:
        """By part, the points of the curves that a report draws."""
        labels = np.array([item.label for item in self.items])
        curves = {}
        for name, scores in self.scores.items():
            image, pixel = image_curves(np.concatenate(scores), labels), self.pixels[name].curves(400)
            named = {
                f"{kind}_{key}": points
                for kind, of in (("image", image), ("pixel", pixel))
                for key, points in of.items()
            }
            curves[name] = {key: tuple(points.values()) for key, points in named.items()}
        return curves

    def best_threshold(self) -> Threshold | None:
        """The thresholds of the highest F1 on these very images; None where they are undefined."""
        labels = np.array([item.label for item in self.items])
        main = next(iter(self.scores))
        score = image_f1_threshold(np.concatenate(self.scores[main]), labels)
        if score is None:
            return None
        source = "highest F1 of images, and of pixels for the contour"
        return Threshold(score, self.pixels[main].f1_threshold(), source, on_test_set=True)
