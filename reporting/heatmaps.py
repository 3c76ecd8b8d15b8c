"""Heat maps: a strip of input, ground truth, map and overlay for each test image, all on one scale of colours."""

import tempfile
import weakref
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import cv2
import numpy as np

from datasets.mvtec import Sample
from reporting.pictures import color_scale, colorize, panels
from utils.files import nearest_existing

PANEL_HEIGHT = 256
SCALE_PIXELS = 1 << 22  # for the range of the colours
UNKNOWN = 96  # grey of the ground truth where an anomalous image has no mask


class Thumbnails:
    """Maps [S, S], shrunk to the height of a strip and kept on disk until the colour scale of all images is known.

    They are written to the disk of `folder`, which need not exist yet. `expected` is the number of all maps; a sample
    of about SCALE_PIXELS pixels of them stays in memory for the scale.
    """

    def __init__(self, folder: Path, expected: int) -> None:
        self.expected = expected
        self._file = tempfile.TemporaryFile(dir=nearest_existing(folder))  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # gone when this object is
        self._count = 0
        self._pixels = array("f")

    def add(self, anomaly_map: np.ndarray) -> None:
        """Add a map; all have the same size."""
        if max(anomaly_map.shape) > PANEL_HEIGHT:
            anomaly_map = cv2.resize(anomaly_map, (PANEL_HEIGHT, PANEL_HEIGHT), interpolation=cv2.INTER_AREA)
        small = anomaly_map.astype(np.float32)
        np.save(self._file, small)
        self._count += 1
        self._pixels.frombytes(small.ravel()[:: -(-self.expected * small.size // SCALE_PIXELS)].tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        self._file.seek(0)
        for _ in range(self._count):
            yield np.load(self._file)

    def state(self) -> dict[str, np.ndarray]:
        """The sample of pixels that decides the scale."""
        return {"pixels": np.array(self._pixels)}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Let the maps of another process count for the scale, given its `state()`."""
        self._pixels.frombytes(np.asarray(state["pixels"]).tobytes())

    def scale(self) -> tuple[float, float]:
        """The range of the colours."""
        return color_scale(np.frombuffer(self._pixels, np.float32))


def strip(sample: Sample, anomaly_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """The four panels, at the frame's own aspect."""
    picture = sample.read()
    size = int(np.clip(PANEL_HEIGHT * picture.size[0] / picture.size[1], 96, 4 * PANEL_HEIGHT)), PANEL_HEIGHT
    frame = np.asarray(picture.image.resize(size))
    truth = np.zeros_like(frame)
    if sample.masks:
        share = cv2.resize(sample.read_mask(picture.size)[0].astype(np.float32), size, interpolation=cv2.INTER_AREA)
        truth[share >= 0.5] = 255
    elif sample.label:
        truth[:] = UNKNOWN
    heat = colorize(cv2.resize(anomaly_map, size), scale)
    overlay = cv2.addWeighted(frame, 0.6, heat, 0.6, 0)
    return panels([("input", frame), ("ground truth", truth), ("anomaly map", heat), ("overlay", overlay)], size)
