"""The prediction for one image: its score, its map in its own pixels, and the regions above a threshold."""

import abc
import dataclasses
import os
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from datasets.images import BROKEN, PLAIN, Decoding, Picture, has_deep_color, read_picture, to_rgb
from datasets.region import RegionOfInterest
from models.fusion.operating_point import OperatingPoint
from utils.errors import InputError

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Picture


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What USAD predicts for an image of H x W pixels; the last three are None without the threshold they need."""

    score: float
    map: np.ndarray  # [H, W] float32, higher is more anomalous
    branches: dict[str, tuple[float, np.ndarray]]  # name -> raw score, map [S, S] float32 at the model's size
    anomalous: bool | None = None  # score at or above the threshold
    boxes: list[tuple[int, int, int, int]] | None = None  # x, y, width, height of each region, largest first
    area: int | None = None  # pixels at or above the pixel threshold


class Model(abc.ABC):
    """The interface between frames and results. It gives scores and maps, whether by PyTorch or by something else."""

    name: str
    device: Any
    batch_size: int  # frames at a time, unless the caller says otherwise
    roi: RegionOfInterest | None
    bit_depth: int  # of the camera behind 16-bit images
    threshold: float | None = None  # of the score
    pixel_threshold: float | None = None
    min_area: int = 0  # pixels that a region needs to count
    operating_point: OperatingPoint | None = None

    def set_operating_point(self, point: OperatingPoint) -> None:
        """Take the thresholds of `point`."""
        self.operating_point = point
        self.threshold, self.pixel_threshold = point.threshold, point.pixel_threshold

    @abc.abstractmethod
    def numbers(self, images: list[Image.Image]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Scores [B] and maps [B, S, S] of RGB images by name, the model's own and its branches'."""

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch_size: int | None = None) -> list[Prediction]:
        """A path, picture, PIL image or RGB array [H, W, 3] of uint8, or a list of these -> a list of predictions.

        Maps, boxes and areas are in each image's own pixels. Raises OSError for a missing file; InputError for
        one that cannot be read, an array of another kind, scores that are not finite.
        """
        if batch_size is not None and not (isinstance(batch_size, Integral) and batch_size > 0):
            raise InputError(f"batch_size {batch_size!r} is not a whole number of at least 1")
        images = list(images) if isinstance(images, list | tuple) else [images]
        batch_size = batch_size or self.batch_size
        predictions = []
        for start in range(0, len(images), batch_size):
            decoding = Decoding(bit_depth=self.bit_depth)
            pictures = [as_picture(image, self.roi, decoding) for image in images[start : start + batch_size]]
            parts = self.numbers([picture.image for picture in pictures])
            for name, numbers in parts.items():
                if not all(np.isfinite(values).all() for values in numbers):
                    raise InputError(f"{name} gives a score or map that is not finite; check the weights")
            for row, picture in enumerate(pictures):
                own = {name: (float(scores[row]), maps[row]) for name, (scores, maps) in parts.items()}
                predictions.append(decide(self, *own.pop(self.name), picture.size, own))
        return predictions


def decide(
    model: Model, score: float, square: np.ndarray, size: tuple[int, int], branches: dict[str, tuple[float, np.ndarray]]
) -> Prediction:
    """The prediction for an image of `size` (width, height) whose map `square` [S, S] is stretched back to it."""
    fused = cv2.resize(square, size, interpolation=cv2.INTER_LINEAR)
    anomalous = None if model.threshold is None else score >= model.threshold
    found = () if model.pixel_threshold is None else regions(fused, model.pixel_threshold, model.min_area)
    return Prediction(score, fused, branches, anomalous, *found)


def as_picture(image: ImageLike, roi: RegionOfInterest | None = None, decoding: Decoding = PLAIN) -> Picture:
    """A path, a picture, a PIL image, or an RGB array [H, W, 3] of uint8 as a picture that shows only `roi`.

    A PIL image is turned by its EXIF orientation, like a file.
    """
    if isinstance(image, str | os.PathLike):
        picture = read_picture(image, decoding)
    elif isinstance(image, Picture):
        picture = image
    elif isinstance(image, Image.Image) and image.mode[0] not in "IF" and all(image.size):  # 8 bits a channel
        if has_deep_color(image) and decoding.bit_depth != 16:
            raise InputError(f"Pillow drops half of a picture's {decoding.bit_depth} bits of colour; give its path")
        try:
            rgb = to_rgb(ImageOps.exif_transpose(image))
        except BROKEN as error:
            raise InputError(f"a PIL image of mode {image.mode} cannot be made RGB ({error}); convert it") from None
        picture = Picture(rgb, rgb.size)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        picture = Picture(Image.fromarray(image), image.shape[1::-1])
    else:
        kind = type(image).__name__
        if isinstance(image, np.ndarray):
            kind = f"{image.dtype} {list(image.shape)}"
        elif isinstance(image, Image.Image):
            kind = f"a PIL image of mode {image.mode} and size {image.size}"
        raise InputError(
            f"an image is {kind}; give a path, a PIL image of 8 bits a channel or an RGB array [H, W, 3] of uint8"
        )
    return picture._replace(image=roi.apply(picture.image)) if roi else picture


def regions(
    anomaly_map: np.ndarray, threshold: float, min_area: int = 0
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Boxes (x, y, width, height), largest area first, of the 8-connected regions at or above, and their pixels."""
    mask = (anomaly_map >= threshold).astype(np.uint8)
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    found = sorted(statistics[1:].tolist(), key=lambda row: -row[cv2.CC_STAT_AREA])
    found = [row for row in found if row[cv2.CC_STAT_AREA] >= min_area]
    return [tuple(row[:4]) for row in found], sum(row[cv2.CC_STAT_AREA] for row in found)
