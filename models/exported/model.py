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
from models.fusion.prediction import Model
from utils.errors import InputError


class OnnxModel(Model):
    """What USAD is to predict.py, by an ONNX file whose metadata are `description`."""

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
        sides = [list(taken.shape[2:]) for taken in session.get_inputs()]
        missing = set(self.output_names(self.parts)) - {given.name for given in session.get_outputs()}
        if sides != [[self.image_size] * 2] or missing:
            raise ValueError(f"image size {self.image_size} and branches {self.parts[1:]} are not those of its graph")
        if description["operating_point"]:
            self.set_operating_point(OperatingPoint.from_values(description["operating_point"]))

    @classmethod
    def load(cls, path: str | os.PathLike) -> OnnxModel:
        """Read an exported file. Raises InputError: not there, damaged, another program's, no onnxruntime."""
        session = open_session(path)
        try:
            return cls(session, json.loads(session.get_modelmeta().custom_metadata_map[FORMAT]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path}: its metadata are not what export_onnx.py writes ({error!r}); export the model again"
            ) from None

    def numbers(self, images: list[Image.Image]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
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
