"""The base class of branches: fit on normal images, predict scores and maps, save, load."""

from __future__ import annotations

import abc
import contextlib
import functools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from datasets.images import DEPTHS
from datasets.region import RegionOfInterest
from models.branches import MAX_TILES, weights_flag
from models.branches.frames import TrainingFrames
from models.branches.part import Part, joined
from models.branches.tiling import TiledBatches, Tiling
from models.networks.backbones import BackboneSpec, build_backbone
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import InputError
from utils.settings import settings_from, settings_of
from utils.timing import Stopwatch

AS_PUBLISHED = "as_published"
STATISTICS = ("images", "score_mean", "score_std", "top_mean", "top_std", "map_mean", "map_std")  # of a calibration
PROFILES = ("border_shift", "border_scale")  # of a calibration, by distance to the border


class Branch(abc.ABC):
    """A way to look at a frame.

    A subclass needs a `name`, `fit` and `predict`; with a backbone, `state` and `load_state` it can be saved. By
    default `predict` calls `extract` (the network), `patch_scores` and `anomaly_map`, each timed.
    """

    name: ClassVar[str]
    score_weight: ClassVar[float] = 1.0  # factor of this branch's score in the paper's fused score
    map_weight: ClassVar[float] = 1.0  # of this branch's map in the standardized fusion
    own_evidence: ClassVar[bool] = True  # the score says what no map and no other score says; else that fusion omits it
    backbone_kind: ClassVar[str] = "tokens"  # or "maps"

    def __init__(self, backbone: nn.Module | None = None, image_size: int | None = None) -> None:
        self.backbone = backbone
        self.tile_size = backbone.spec.image_size if image_size is None else image_size  # side of the network's input
        self.tiles = 1  # along each side of a frame
        self.device = torch.device("cpu") if backbone is None else backbone.device
        self.training: dict[str, Any] = {}  # what it was fitted on, for the checkpoint
        self.frames = TrainingFrames()
        self.calibration: dict[str, float] | None = None  # statistics on held-out normal images
        self.roi: RegionOfInterest | None = None
        self.bit_depth = DEPTHS[-1]  # of the camera behind 16-bit images
        self.stopwatch = Stopwatch(self.device)

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.tiles, self.tile_size)

    @property
    def image_size(self) -> int:
        """Side of the square images that `predict` takes."""
        return self.tiling.frame_side

    @abc.abstractmethod
    def fit(self, loader: Iterable[dict[str, Any]]) -> None:
        """Learn what is normal from batches whose "image" is [B, 3, S, S], ImageNet-normalised; "index" is [B].

        With several processes each sees its share. The main process learns from what `collect` merges
        (utils/gather.py), and its `state` is sent to the others.
        """

    def update(self, loader: Iterable[dict[str, Any]]) -> None:
        """Learn from further images as if `fit` had seen them, too; a branch need not have this.

        Of several processes only the main one may add what was learned before to what `collect` merges.
        """
        raise NotImplementedError

    def predict(self, images: Tensor) -> Part:
        """Images [B, 3, S, S] at `image_size` -> scores [B], of several tiles the strangest's, and maps [B, S, S]."""
        if self.tiles == 1:
            return self._predict_tiles(images)
        views, parts = self.tiling.views(self.roi), []
        for view in views:
            with self.looking_at(view.roi):
                parts.append(self._predict_tiles(self.tiling.cut(images, view)))
        with self.stopwatch("score"):
            return joined(parts, self.tiling, views).inside(self.roi)

    def _predict_tiles(self, images: Tensor) -> Part:
        with self.stopwatch("extract"):
            features = self.extract(images)
        with self.stopwatch("score"):
            return self.score(features)

    @contextlib.contextmanager
    def looking_at(self, roi: RegionOfInterest | None) -> Iterator[None]:
        """The branch with the region of interest of some tiles in the place of that of the frame."""
        frame, self.roi = self.roi, roi
        try:
            yield
        finally:
            self.roi = frame

    def extracted(self, loader: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Images, their numbers and their features, batch by batch; raises InputError if the network is not finite."""
        for batch in loader:
            images = batch["image"].to(self.device, non_blocking=True)
            yield images, batch["index"], self.extract(images)
        self.backbone.check_finite()

    def batches(self, loader: Any) -> Any:
        """The batches of frames in `loader` as `fit` and `update` take them."""
        return loader if self.tiles == 1 else TiledBatches(loader, self)

    def score(self, features: Any) -> Part:
        """The output of `extract` -> scores [B] and maps [B, S, S] of tiles."""
        return self.part(*self.patch_scores(features))

    def part(self, scores: Tensor, patches: Tensor) -> Part:
        """The output of `patch_scores`, scores [B] and values [B, h, w], with the maps [B, S, S] made of the values."""
        return Part(scores, *self.anomaly_map(patches)).inside(self.roi)

    def extract(self, images: Tensor) -> Any:
        """Images [B, 3, S, S] -> the network's features, which `patch_scores` takes."""
        raise NotImplementedError

    def patch_scores(self, features: Any) -> tuple[Tensor, Tensor]:
        """The output of `extract` -> scores [B], and a value for each patch [B, h, w]."""
        raise NotImplementedError

    def anomaly_map(self, patches: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The values of the patches [B, h, w] -> maps [B, S, S] at `tile_size`, and `low` and `span` of a `Part`."""
        raise NotImplementedError

    def parts(self) -> list[str]:
        return [self.name, AS_PUBLISHED]

    def predict_parts(self, images: Tensor) -> dict[str, Part]:
        """The prediction, and the same with each map scaled to its own range, as the paper's product takes it."""
        part = self.predict(images)
        return {self.name: part, AS_PUBLISHED: Part(part.scores, part.scaled())}

    def looked_at(self, patches: Tensor) -> Tensor:
        """Of the patches [B, N, ...] of the grid, those in the region of interest [B, n, ...]."""
        return patches if self.roi is None else patches[:, _cells_inside(self.roi, self.backbone.grid, patches.device)]

    def on_grid(self, values: Tensor) -> Tensor:
        """Values [B, n] of the patches in the region of interest -> [B, h, w]; elsewhere their mean."""
        if self.roi is None:
            return values.unflatten(1, self.backbone.grid)
        columns = _columns_of_cells(self.roi, self.backbone.grid, values.device)
        return torch.cat([values, values.mean(1, keepdim=True)], 1)[:, columns].unflatten(1, self.backbone.grid)

    def stopwatches(self) -> dict[str, Stopwatch]:
        return {self.name: self.stopwatch}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, plain JSON values kept under their names; the backbone has the image size."""
        return settings_of(self)

    def state(self) -> dict[str, Tensor]:
        """What `fit` learned, as named tensors."""
        raise NotImplementedError

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned; raises InputError if a tensor is missing or has another shape."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike) -> None:
        """Write the checkpoint (safetensors, atomically)."""
        save_checkpoint(path, {**self.state(), **self.frames.state()}, self.metadata())

    def metadata(self) -> dict[str, Any]:
        """What the checkpoint holds beside tensors, as plain JSON values."""
        return {
            "branch": self.name,
            "backbone": self.backbone.spec.to_dict(),
            "settings": self.settings(),
            "training": self.training,
            "calibration": self.calibration,
            "roi": self.roi and self.roi.to_text(),
            "bit_depth": self.bit_depth,
            "tiles": self.tiles,
        }

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        weights: str | None = None,
        device: str = "cpu",
        precision: str = "auto",
        flag: str | None = None,
    ) -> Branch:
        """Read a checkpoint and the network that it was fitted with.

        `weights`, which people give with `flag`, says where weights given as a file are now; `precision` "auto" is the
        one of the training where the device has it. Raises InputError for another branch's checkpoint, a damaged one,
        or other weights.
        """
        tensors, metadata = load_checkpoint(path)
        with understood(path, metadata, cls.name):
            spec = BackboneSpec.from_dict(metadata["backbone"])
            settings, training, calibration = (metadata[key] for key in ("settings", "training", "calibration"))
            settings = settings_from(cls, settings)
            roi, bit_depth, tiles = region_in(metadata), bit_depth_in(metadata), tiles_in(metadata)
            Tiling(tiles, spec.image_size)  # raises if that cannot be
            if not isinstance(training, dict):
                raise TypeError("training")
            if calibration is not None:
                _check_statistics(calibration)
            branch = cls(build_backbone(spec, device, weights, precision, flag or weights_flag(cls.name)), **settings)
        try:
            branch.load_state(tensors)
            branch.frames = TrainingFrames.from_state(tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}; train the branch again") from None
        branch.training, branch.calibration, branch.roi, branch.bit_depth = training, calibration, roi, bit_depth
        branch.tiles = tiles
        return branch


@functools.lru_cache(maxsize=256)  # with tiles there are many regions
def _cells_inside(roi: RegionOfInterest, grid: tuple[int, int], device: torch.device) -> Tensor:
    """The numbers [n] of the grid cells that lie in the region of interest."""
    return torch.from_numpy(np.flatnonzero(roi.on_grid(*grid))).to(device)


@functools.lru_cache(maxsize=256)
def _columns_of_cells(roi: RegionOfInterest, grid: tuple[int, int], device: torch.device) -> Tensor:
    """For each cell of the grid [h * w] its position among those in the region of interest, else their number."""
    inside = roi.on_grid(*grid).ravel()
    return torch.from_numpy(np.where(inside, inside.cumsum() - 1, inside.sum())).to(device)


@contextlib.contextmanager
def understood(path: str | os.PathLike, metadata: dict[str, Any], name: str) -> Iterator[None]:
    """Whatever the block finds wrong with a checkpoint's metadata is an InputError, as is another branch's name."""
    if metadata.get("branch") != name:
        raise InputError(f"{path} is a checkpoint of branch '{metadata.get('branch')}', not of '{name}'")
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: its metadata is not what branch '{name}' writes ({error!r}); train the branch again"
        ) from error


def region_in(metadata: dict[str, Any]) -> RegionOfInterest | None:
    """The region of interest of a checkpoint. Raises ValueError or InputError if it is damaged."""
    text = metadata.get("roi")  # earlier versions had none
    return None if text is None else RegionOfInterest.from_text(text)


def bit_depth_in(metadata: dict[str, Any]) -> int:
    return DEPTHS[DEPTHS.index(metadata.get("bit_depth", DEPTHS[-1]))]  # earlier versions took all to be of 16 bits


def tiles_in(metadata: dict[str, Any]) -> int:
    """Tiles along each side, of a checkpoint. Raises ValueError where it is no such number."""
    tiles = metadata.get("tiles", 1)  # earlier versions had none
    if tiles not in range(1, MAX_TILES + 1):
        raise ValueError(f"tiles {tiles!r}")
    return int(tiles)


def _check_statistics(calibration: dict[str, float]) -> None:
    """Raises KeyError or ValueError that names the first statistic that is missing or impossible."""
    profiles = [name for name in PROFILES if name in calibration]  # earlier versions had none
    for name in (*STATISTICS, *profiles):
        values = calibration[name] if name in profiles else [calibration[name]]
        positive = name == "images" or name.endswith(("_std", "_scale"))
        if not all(math.isfinite(value) and (value > 0 or not positive) for value in values):
            raise ValueError(name)
