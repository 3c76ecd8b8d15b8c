"""A fusion that was exported to an ONNX file, run by onnxruntime on the CPU. Needs no PyTorch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets.images import DEPTHS, stretched
from datasets.region import RegionOfInterest
from models.exported import EDGE, FORMAT
from models.fusion.operating_point import OperatingPoint
from models.fusion.prediction import ImageLike, Prediction, predict_in_batches
from utils.errors import InputError


class OnnxModel:
    """What USAD is to predict.py: scores and maps of frames, by an ONNX file instead of PyTorch.

    `description` is the file's metadata, as models/exported/export.py writes them. Raises KeyError, TypeError,
    ValueError or AttributeError if they are not, or do not fit the graph.
    """

    name = "fusion"
    device = "cpu"
    batch_size = 1  # more frames at a time gain nothing on a CPU

    def __init__(self, session: Any, description: dict[str, Any]) -> None:
        self.session = session
        self.description = description
        self.image_size = int(description["image_size"])
        self.bit_depth = DEPTHS[DEPTHS.index(description["bit_depth"])]
        self.roi = description["roi"] and RegionOfInterest.from_text(description["roi"])
        self.parts = [self.name, *description["branches"]]
        self._check_graph()
        self.min_area = 0  # pixels that a region needs to count
        self.threshold: float | None = None  # of the score
        self.pixel_threshold: float | None = None
        self.operating_point: OperatingPoint | None = None
        if description["operating_point"]:
            self.operating_point = point = OperatingPoint.from_values(description["operating_point"])
            self.threshold, self.pixel_threshold = point.threshold, point.pixel_threshold

    @classmethod
    def load(cls, path: str | os.PathLike) -> OnnxModel:
        """The model of a file. Raises InputError: not there, damaged, another program's, no onnxruntime."""
        session = open_session(path)
        try:
            return cls(session, json.loads(session.get_modelmeta().custom_metadata_map[FORMAT]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: its metadata are not what export_onnx.py writes ({error!r}); export the model again"
            ) from None

    def _check_graph(self) -> None:
        """Raise ValueError if the graph takes frames of another size, or lacks a part."""
        sides = [list(taken.shape[2:]) for taken in self.session.get_inputs()]
        missing = set(self.output_names(self.parts)) - {given.name for given in self.session.get_outputs()}
        if sides != [[self.image_size] * 2] or missing:
            raise ValueError(f"image size {self.image_size} and branches {self.parts[1:]} are not those of its graph")

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch_size: int | None = None) -> list[Prediction]:
        """See `predict_in_batches`."""
        return predict_in_batches(self, images, batch_size, self._numbers)

    def _numbers(self, images: list[Image.Image]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Scores [B] and maps [B, S, S] of RGB images, by part."""
        found = self.session.run(self.output_names(self.parts), {"images": as_input(images, self.image_size)})
        return dict(zip(self.parts, zip(found[::2], found[1::2], strict=True), strict=True))

    @classmethod
    def output_names(cls, parts: Sequence[str]) -> list[str]:
        """The graph's outputs: `score` and `map`, then `<branch>_score` and `<branch>_map` of each branch."""
        prefixes = ("" if part == cls.name else f"{part}_" for part in parts)
        return [f"{prefix}{kind}" for prefix in prefixes for kind in ("score", "map")]


def as_input(images: Sequence[Image.Image], size: int) -> np.ndarray:
    """RGB images -> the graph's input `images`, float32 [B, 3, size, size] in 0 to 1."""
    pixels = np.stack([stretched(image, size, "bicubic") for image in images])
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 255


def open_session(path: str | os.PathLike) -> Any:
    """onnxruntime's session for a file, on the CPU."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"onnxruntime is not installed; pip install -r {EDGE}") from None
    if not Path(path).is_file():
        raise InputError(f"no file {path}; make it with export_onnx.py")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a damaged or hostile file may fail anywhere inside onnxruntime
        reason = str(error).replace(os.fspath(path), "it").partition("\n")[0][:160]
        raise InputError(f"{path} cannot be run by onnxruntime ({reason}); export it again") from None
