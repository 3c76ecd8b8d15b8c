"""What is said of one image: its score, its map in its own pixels, and the regions above a threshold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image

from datasets.images import read_image
from models.fusion.operating_point import OperatingPoint
from utils.errors import InputError

ImageLike = str | os.PathLike | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What USAD says of one image of H x W pixels; the last three are None without the threshold they need."""

    score: float
    map: np.ndarray  # [H, W] float32, higher is more anomalous
    branches: dict[str, tuple[float, np.ndarray]]  # name -> raw score, map [S, S] float32 at the model's size
    anomalous: bool | None = None  # score at or above the threshold
    boxes: list[tuple[int, int, int, int]] | None = None  # x, y, width, height of each region, largest first
    area: int | None = None  # pixels at or above the pixel threshold


class Model(Protocol):
    """What frames are shown to. It gives scores and maps; whether PyTorch computes them does not matter."""

    name: str
    device: Any
    threshold: float | None
    pixel_threshold: float | None
    operating_point: OperatingPoint | None

    batch_size: int  # frames at a time, unless the caller says otherwise

    def __call__(self, images: Sequence[ImageLike], batch_size: int | None = None) -> list[Prediction]: ...


def decide(
    score: float,
    square: np.ndarray,
    size: tuple[int, int],
    branches: dict[str, tuple[float, np.ndarray]],
    threshold: float | None,
    pixel_threshold: float | None,
) -> Prediction:
    """The prediction for an image of `size` (width, height) whose map `square` [S, S] is stretched back to it."""
    fused = cv2.resize(square, size, interpolation=cv2.INTER_LINEAR)
    anomalous = None if threshold is None else score >= threshold
    boxes, area = (None, None) if pixel_threshold is None else regions(fused, pixel_threshold)
    return Prediction(score, fused, branches, anomalous, boxes, area)


def as_picture(image: ImageLike) -> Image.Image:
    """A path, a PIL image, or an RGB array [H, W, 3] of uint8 as an RGB image."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return Image.fromarray(image)
    kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise InputError(f"an image is {kind}; give a path, a PIL image or an RGB array [H, W, 3] of uint8")


def regions(anomaly_map: np.ndarray, threshold: float) -> tuple[list[tuple[int, int, int, int]], int]:
    """Boxes (x, y, width, height), largest area first, of the 8-connected regions at or above, and their pixels."""
    mask = (anomaly_map >= threshold).astype(np.uint8)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    found = sorted(statistics[1:].tolist(), key=lambda row: -row[cv2.CC_STAT_AREA])
    return [tuple(row[:4]) for row in found], int(mask.sum())
