"""USAD: the branches' maps multiplied, their scores added."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.branches.branch import Branch, Parts
from models.branches.postprocess import gaussian_blur, mean_of_top, resize_images, resize_maps
from models.fusion.operating_point import OperatingPoint, checkpoint_digests
from models.fusion.prediction import ImageLike, Prediction, predict_images
from utils.checkpoint import load_checkpoint
from utils.errors import InputError
from utils.timing import Stopwatch

FUSIONS = ("paper", "standardized")


class USAD:
    """Fuses any branches; knows them only by their scores, maps and names.

    paper: M = product of the maps; s = Σ weight · branch score + lambda_map · max M; the returned map is M after
    a 5x5 Gaussian blur. A branch's weight is its `score_weight` (MACLU 0.01, PatchCore 1, MA2Patch 0) unless
    `score_weights` names it.
    standardized: for small data sets, where the raw scales mean little. Each branch's score, map, and mean of the
    map's highest hundredth are standardised by its statistics on held-out normal images. M is the mean of the maps,
    and t that of their highest hundredths, weighted by the branches' `map_weight` (PatchCore 8, the others 1). s
    combines t and the scores as Fisher combines tests, √(-2 Σ log p), p being the probability that a normal image has
    more, under a normal distribution: near 3 for a normal image (root of a χ² of eight degrees), and for a strange one
    near the root of the sum of the squared deviations.
    """

    name = "fusion"

    def __init__(
        self,
        branches: Sequence[Branch],
        score_weights: dict[str, float] | None = None,
        lambda_map: float = 1.0,
        fusion: str = "paper",
    ) -> None:
        if fusion not in FUSIONS:
            raise InputError(f"fusion '{fusion}' is not one of {', '.join(FUSIONS)}")
        self.branches = list(branches)
        self.image_size = max(branch.image_size for branch in branches)
        self.device = branches[0].device
        self.score_weights = {branch.name: branch.score_weight for branch in branches} | (score_weights or {})
        self.lambda_map = lambda_map
        self.fusion = fusion
        if fusion == "standardized":
            for branch in branches:
                if branch.calibration is None:
                    raise InputError(
                        f"--fusion standardized needs held-out statistics, and branch '{branch.name}' has none; "
                        "train the three branches with --holdout-ratio, for instance 0.2"
                    )
        for branch in branches:
            branch.rescale_maps = fusion == "paper"
        self.stopwatch = Stopwatch()
        self.operating_point: OperatingPoint | None = None
        self.threshold: float | None = None  # of the score
        self.pixel_threshold: float | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: str = "cpu",
        precision: str = "auto",
        weights: dict[str, str | None] | None = None,
        **options: Any,
    ) -> USAD:
        """The fusion of the branches whose checkpoints lie in `folder`, for instance saved_models/coal_ad.

        `weights` says by branch name where weights given as files are now; `options` are the constructor's. Without
        options, the fusion and the thresholds are those of the operating point stored in the folder, if there is one;
        with them, the thresholds are taken if they were made for these options. Where neither says so, the fusion is
        the one that the checkpoints call for.
        Raises InputError naming every checkpoint that is missing, or what is wrong with one or the operating point.
        """
        folder = Path(folder)
        paths = checkpoint_paths(folder)
        point = OperatingPoint.read(folder)
        current = point is not None and point.checkpoints == checkpoint_digests(folder)
        if point and not options:
            if not current:
                raise InputError(
                    f"{folder / 'usad.json'} was made for other checkpoints; run test_fusion.py --false-alarm-rate "
                    "again, or delete it"
                )
            options = point.fusion
        if "fusion" not in options:
            options = options | {"fusion": default_fusion(folder)}
        branches = [
            branch.load(path, (weights or {}).get(branch.name), device, precision) for branch, path in paths.items()
        ]
        try:
            usad = cls(branches, **options)
        except TypeError as error:
            raise InputError(f"{folder}: these are no fusion settings ({error})") from None
        if current and point.fusion == usad.settings():
            usad.set_operating_point(point)
        return usad

    def set_operating_point(self, point: OperatingPoint) -> None:
        """Take the thresholds of `point`."""
        self.operating_point = point
        self.threshold, self.pixel_threshold = point.threshold, point.pixel_threshold

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments beside the branches, as plain JSON values."""
        return {"score_weights": self.score_weights, "lambda_map": self.lambda_map, "fusion": self.fusion}

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch_size: int = 8) -> list[Prediction]:
        """A path, PIL image or RGB array [H, W, 3] of uint8, of any size, or a list of these -> a list of predictions.

        Maps, boxes and areas are in each image's own pixels.
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        starts = range(0, len(images), batch_size)
        return [
            prediction for start in starts for prediction in predict_images(self, images[start : start + batch_size])
        ]

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S] at `image_size` -> fused scores [B], fused maps [B, S, S]."""
        return self.predict_parts(images)[self.name]

    def predict_parts(self, images: Tensor) -> Parts:
        """The fused prediction and each branch's own, maps all [B, S, S]; each branch sees the images resized."""
        parts: Parts = {}
        for branch in self.branches:
            scores, maps = branch.predict(resize_images(images, branch.image_size))
            parts[branch.name] = scores, resize_maps(maps, self.image_size)
        with self.stopwatch("score"):
            return {self.name: self.fuse(parts), **parts}

    def stopwatches(self) -> dict[str, Stopwatch]:
        """The times of the stages, by part."""
        return {self.name: self.stopwatch, **{branch.name: branch.stopwatch for branch in self.branches}}

    def fuse(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Branch scores [B] and maps [B, S, S] -> fused scores [B] (float64) and maps [B, S, S]."""
        if self.fusion == "standardized":
            return self._standardized(parts)
        product = torch.stack([maps for _, maps in parts.values()]).prod(0)
        scores = sum(self.score_weights[name] * scores.double() for name, (scores, _) in parts.items())
        scores = scores + self.lambda_map * product.amax((1, 2)).double()
        return scores, gaussian_blur(product, sigma=1.0, radius=2, edge_repeated=False)

    def _standardized(self, parts: Parts) -> tuple[Tensor, Tensor]:
        scores, tops, fused = [], 0.0, 0.0
        total = sum(branch.map_weight for branch in self.branches)
        for branch in self.branches:
            raw_scores, maps = parts[branch.name]
            weight = branch.map_weight / total
            scores.append(_standardize(raw_scores.double(), branch.calibration, "score"))
            tops = tops + weight * _standardize(mean_of_top(maps).double(), branch.calibration, "top")
            fused = fused + weight * _standardize(maps, branch.calibration, "map")
        return (-2 * torch.special.log_ndtr(-torch.stack([*scores, tops])).sum(0)).sqrt(), fused


def _standardize(values: Tensor, statistics: dict[str, float], part: str) -> Tensor:
    return (values - statistics[f"{part}_mean"]) / statistics[f"{part}_std"]


def default_fusion(folder: Path) -> str:
    """The fusion that the checkpoints in `folder` call for: standardized if all are of the demo network.

    Raises InputError where one is missing or damaged.
    """
    contents = [load_checkpoint(path)[1] for path in checkpoint_paths(folder).values()]
    return "standardized" if all(map(_of_demo_network, contents)) else "paper"


def _of_demo_network(metadata: dict[str, Any]) -> bool:
    network = metadata.get("backbone")
    return isinstance(network, dict) and network.get("weights") == "demo" and metadata.get("calibration") is not None


def checkpoint_paths(folder: Path) -> dict[type[Branch], Path]:
    """The branches' checkpoints in `folder`; raises InputError naming every one that is missing."""
    from models import BRANCHES

    paths = {branch: folder / f"{branch.name}.safetensors" for branch in BRANCHES}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise InputError(
            f"{folder} has no {', '.join(missing)}; train with train_<branch>.py and copy trained_models/ to "
            "saved_models/ (or pass --models-dir trained_models), or use convert_published.py"
        )
    return paths
