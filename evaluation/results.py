"""What a test run gathers, batch by batch: scores, pixel metrics, small maps, pictures for the report."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from datasets.mvtec import Sample, defects_without_masks
from datasets.region import RegionOfInterest
from metrics import METRICS
from models.branches.part import Part
from reporting.gallery import Entry, Gallery, Pictures
from reporting.heatmaps import Thumbnails
from reporting.report import Curves, Threshold
from utils.command_line import warn_once
from utils.errors import InputError
from utils.gather import collect


class Results:
    """Scores, metrics and small maps of a test run, by part (a branch's name, or `fusion`), the main part first.

    This process gathers those of its share of the samples, from number `first` on; `collect` adds the other processes'.
    With `report` it also keeps the pictures of a report, with `thumbnails` the small maps for heat maps. Pixels outside
    the region of interest do not count. If a defect has no masks at all, the figures of pixels are undefined.
    """

    def __init__(
        self,
        samples: list[Sample],
        parts: Iterable[str],
        first: int = 0,
        report: bool = False,
        thumbnails: Thumbnails | None = None,
        roi: RegionOfInterest | None = None,
    ) -> None:
        self.samples = samples
        self.unmasked = defects_without_masks(samples)
        if self.unmasked:
            example = next(sample.expected_mask for sample in samples if sample.kind in self.unmasked)
            text = f"no masks of {', '.join(self.unmasked)} (for instance {example}): figures of pixels are null"
            warn_once(text, f"{text}, those of images are computed")
        self.scores = {part: np.zeros(len(samples)) for part in parts}  # 0 for the images of other processes
        self.measured = {part: {name: metric() for name, metric in METRICS.items()} for part in self.scores}
        self.gallery = Gallery(len(samples), first=first) if report else None
        self.thumbnails = thumbnails
        self.roi = roi

    def add(self, parts: Mapping[str, Part], batch: dict[str, Any]) -> np.ndarray:
        """Add the parts of a batch; returns the main maps [B, S, S]."""
        arrays = {name: part.arrays() for name, part in parts.items()}
        inside = self.roi and self.roi.at(*batch["mask"].shape[1:])

        def add_part(name: str) -> None:
            scores, maps = arrays[name]
            finite = np.isfinite(scores) & np.isfinite(maps).all((1, 2))
            if not finite.all():
                sample = self.samples[int(batch["index"][int(np.argmin(finite))])]
                raise InputError(f"{name} gives a score or map that is not finite on {sample.path}; check the weights")
            self.scores[name][np.asarray(batch["index"])] = scores
            for metric in self.measured[name].values():
                if not (metric.needs_masks and self.unmasked):
                    metric.update(maps, batch["mask"].numpy(), batch["label"].numpy() == 1, scores, inside)

        self._for_each_part(add_part)
        main = next(iter(arrays.values()))[1]
        if self.thumbnails is not None:
            for anomaly_map in main:
                self.thumbnails.add(anomaly_map)
        if self.gallery is not None:
            for row, index in enumerate(batch["index"]):
                self._keep(self.samples[int(index)], {name: (s[row], m[row]) for name, (s, m) in arrays.items()})
        return main

    def collect(self) -> bool:
        """Merge what all processes have gathered into the main one's; returns whether this is the main one."""
        optional = (part for part in (self.gallery, self.thumbnails) if part is not None)
        metrics = (metric for metrics in self.measured.values() for metric in metrics.values())
        return collect(self, *metrics, *optional)

    def state(self) -> dict[str, np.ndarray]:
        """The scores by part."""
        return self.scores

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add another process's scores, given their `state()`."""
        for name, scores in state.items():
            self.scores[name] += np.asarray(scores)

    def _for_each_part(self, work: Callable[[str], Any]) -> dict[str, Any]:
        """What `work` gives for each part's name. Each has a thread: NumPy sorts and copies beside other threads."""
        with ThreadPoolExecutor() as threads:
            return dict(zip(self.scores, threads.map(work, self.scores), strict=True))

    def _keep(self, sample: Sample, parts: dict[str, tuple[float, np.ndarray]]) -> None:
        def pictures() -> Pictures:
            picture = sample.read()
            truth = sample.read_mask(picture.size)[0] if sample.masks else None
            image = self.roi.apply(picture.image) if self.roi else picture.image
            return Pictures(np.asarray(image), {name: part for name, (_, part) in parts.items()}, truth)

        scores = {name: float(score) for name, (score, _) in parts.items()}
        self.gallery.add(Entry(sample.name, scores, sample.label, sample.kind), pictures)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """By part, every figure of metrics.json; an undefined figure is None."""
        counts = {"n_images": len(self.samples), "n_anomalous": sum(sample.label for sample in self.samples)}

        def figures(part: str) -> dict[str, Any]:
            found = {}
            for metric in self.measured[part].values():
                values = metric.compute()
                found |= {key: None if values[key] is None else float(values[key]) for key in metric.protocols}
            return found

        return {part: found | counts for part, found in self._for_each_part(figures).items()}

    def curves(self) -> Curves:
        """By part, the points of the curves for the report."""
        return {
            part: {name: points for metric in metrics.values() for name, points in metric.curves().items()}
            for part, metrics in self.measured.items()
        }

    def best_threshold(self) -> Threshold | None:
        """The thresholds of the highest F1 on these test images; None where undefined."""
        measured = self.measured[next(iter(self.scores))]
        score = measured["image"].f1_threshold()
        if score is None:
            return None
        source = "highest F1 of images, and of pixels for the contour"
        return Threshold(score, measured["pixel"].f1_threshold(), source, on_test_set=True)
