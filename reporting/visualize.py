"""Heat-map strips: input, ground truth, anomaly map, overlay."""

from __future__ import annotations

import math
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from datasets.mvtec import Sample
from utils.files import atomic_write, nearest_existing

PANEL_HEIGHT = 256
HEADER = 22
SCALE_PIXELS = 1 << 22  # for the range of the colours
UNKNOWN = 96  # grey of the ground truth where an anomalous image has no mask
TITLES = ("input", "ground truth", "anomaly map", "overlay")


class Thumbnails:
    """Maps [S, S], shrunk to the height of a strip and kept on disk until the colour scale of all images is known.

    They are written to the disk of `folder`, which need not exist yet. `expected` is the number of all maps; a sample
    of about SCALE_PIXELS pixels of them stays in memory for the scale.
    """

    def __init__(self, folder: Path, expected: int) -> None:
        self.expected = expected
        self._file = tempfile.TemporaryFile(dir=nearest_existing(folder))  # noqa: SIM115 (gone when this object is)
        self._shape: tuple[int, ...] = ()
        self._pixels = array("f")

    def add(self, anomaly_map: np.ndarray) -> None:
        """Add a map; all have the same size."""
        if max(anomaly_map.shape) > PANEL_HEIGHT:
            anomaly_map = cv2.resize(anomaly_map, (PANEL_HEIGHT, PANEL_HEIGHT), interpolation=cv2.INTER_AREA)
        small = anomaly_map.astype(np.float32)
        self._shape = small.shape
        self._file.write(small.tobytes())
        self._pixels.frombytes(small.ravel()[:: -(-self.expected * small.size // SCALE_PIXELS)].tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        while data := self._file.read(4 * math.prod(self._shape)):
            yield np.frombuffer(data, np.float32).reshape(self._shape)

    def state(self) -> dict[str, np.ndarray]:
        """The sample of pixels that decides the scale."""
        return {"pixels": np.array(self._pixels)}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Let the maps of another process count for the scale, given its `state()`."""
        self._pixels.frombytes(np.asarray(state["pixels"]).tobytes())

    def scale(self) -> tuple[float, float]:
        """The range of the colours."""
        return color_scale(np.frombuffer(self._pixels, np.float32))


def color_scale(pixels: np.ndarray) -> tuple[float, float]:
    """The range of the colours, common to all images: median to 99.9th percentile of the pixels [N]."""
    low, high = np.percentile(pixels, (50, 99.9)).tolist()
    return low, max(high, low + 1e-12)


def colorize(anomaly_map: np.ndarray, scale: tuple[float, float], colors: int = cv2.COLORMAP_TURBO) -> np.ndarray:
    """Map [H, W] -> BGR uint8 [H, W, 3]."""
    levels = np.interp(anomaly_map, scale, (0, 255))
    return cv2.applyColorMap(levels.astype(np.uint8), colors)


def strip(sample: Sample, anomaly_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """The four panels side by side, at the frame's own aspect, BGR uint8."""
    picture = sample.read()
    size = int(np.clip(PANEL_HEIGHT * picture.size[0] / picture.size[1], 96, 4 * PANEL_HEIGHT)), PANEL_HEIGHT
    frame = cv2.cvtColor(np.asarray(picture.image.resize(size)), cv2.COLOR_RGB2BGR)
    truth = np.zeros_like(frame)
    if sample.masks:
        share = cv2.resize(sample.read_mask(picture.size)[0].astype(np.float32), size, interpolation=cv2.INTER_AREA)
        truth[share >= 0.5] = 255
    elif sample.label:
        truth[:] = UNKNOWN
    heat = colorize(cv2.resize(anomaly_map, size, interpolation=cv2.INTER_LINEAR), scale)
    panels = (frame, truth, heat, cv2.addWeighted(frame, 0.55, heat, 0.45, 0))
    framed = [cv2.copyMakeBorder(panel, HEADER, 2, 2, 2, cv2.BORDER_CONSTANT, value=(32, 32, 32)) for panel in panels]
    for panel, title in zip(framed, TITLES, strict=True):
        cv2.putText(panel, title, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (235, 235, 235), 1, cv2.LINE_AA)
    return np.hstack(framed)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write BGR uint8 as PNG, atomically (through memory, since OpenCV cannot open every path on Windows)."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", image)[1].tobytes())
