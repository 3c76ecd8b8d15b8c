"""From images of any size to scores, maps in source pixels, and the regions above a threshold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image

from datasets.images import read_image
from datasets.loading import to_tensor
from utils.errors import InputError

if TYPE_CHECKING:
    from models.fusion.usad import USAD

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


def predict_images(usad: USAD, images: Sequence[ImageLike]) -> list[Prediction]:
    """Predictions of one batch, each image stretched to the model's square and its map stretched back.

    Raises InputError for a file that cannot be read, an array of another kind, or scores that are not finite.
    """
    pictures = [as_picture(image) for image in images]
    batch = torch.stack([to_tensor(picture, usad.image_size, "bicubic") for picture in pictures])
    parts = {
        name: (scores.double().cpu().numpy(), maps.float().cpu().numpy())
        for name, (scores, maps) in usad.predict_parts(batch.to(usad.device)).items()
    }
    for name, (scores, maps) in parts.items():
        if not (np.isfinite(scores).all() and np.isfinite(maps).all()):
            raise InputError(f"{name} gives a score or map that is not finite; check the weights")
    predictions = []
    for index, picture in enumerate(pictures):
        branches = {name: (float(scores[index]), maps[index]) for name, (scores, maps) in parts.items()}
        score, square = branches.pop(usad.name)
        fused = cv2.resize(square, picture.size, interpolation=cv2.INTER_LINEAR)
        anomalous = None if usad.threshold is None else score >= usad.threshold
        boxes, area = (None, None) if usad.pixel_threshold is None else regions(fused, usad.pixel_threshold)
        predictions.append(Prediction(score, fused, branches, anomalous, boxes, area))
    return predictions


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
