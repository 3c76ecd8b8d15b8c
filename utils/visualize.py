"""Heat-map strips: input, ground truth, anomaly map, overlay."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from datasets.images import read_image, read_mask
from datasets.mvtec import Item
from utils.files import atomic_write

PANEL_HEIGHT = 256
HEADER = 22
TITLES = ("input", "ground truth", "anomaly map", "overlay")


def thumbnail(anomaly_map: np.ndarray) -> np.ndarray:
    """A map [S, S] at no more than the strip's height: what is kept until the common scale is known."""
    if max(anomaly_map.shape) > PANEL_HEIGHT:
        anomaly_map = cv2.resize(anomaly_map, (PANEL_HEIGHT, PANEL_HEIGHT), interpolation=cv2.INTER_AREA)
    return anomaly_map.astype(np.float32)


def color_scale(maps: list[np.ndarray]) -> tuple[float, float]:
    """The range that colours stand for, common to all images: median to 99.9th percentile of the pixels."""
    pixels = np.concatenate([image.ravel()[::7] for image in maps])
    low, high = (float(value) for value in np.percentile(pixels, (50, 99.9)))
    return low, max(high, low + 1e-12)


def colorize(anomaly_map: np.ndarray, scale: tuple[float, float], colors: int = cv2.COLORMAP_TURBO) -> np.ndarray:
    """Map [H, W] -> BGR uint8 [H, W, 3]."""
    low, high = scale
    levels = ((anomaly_map.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255
    return cv2.applyColorMap(levels.astype(np.uint8), colors)


def strip(item: Item, anomaly_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """The four panels side by side, at the frame's own aspect, BGR uint8."""
    image = read_image(item.path)
    width = int(np.clip(PANEL_HEIGHT * image.width / image.height, 96, 4 * PANEL_HEIGHT))
    size = (width, PANEL_HEIGHT)
    frame = cv2.cvtColor(np.asarray(image.resize(size)), cv2.COLOR_RGB2BGR)
    truth = np.zeros_like(frame)
    if item.mask is not None:
        mask = np.asarray(read_mask(item.mask, image.size).resize(size))
        truth[mask >= 128] = 255
    heat = colorize(cv2.resize(anomaly_map, size, interpolation=cv2.INTER_LINEAR), scale)
    overlay = cv2.addWeighted(frame, 0.55, heat, 0.45, 0)
    return np.hstack([_titled(*panel) for panel in zip((frame, truth, heat, overlay), TITLES, strict=True)])


def write_png(path: Path, image: np.ndarray) -> None:
    """Write BGR uint8 as PNG, atomically (through memory, since OpenCV cannot open every path on Windows)."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", image)[1].tobytes())


def _titled(panel: np.ndarray, title: str) -> np.ndarray:
    panel = cv2.copyMakeBorder(panel, HEADER, 2, 2, 2, cv2.BORDER_CONSTANT, value=(32, 32, 32))
    cv2.putText(panel, title, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (235, 235, 235), 1, cv2.LINE_AA)
    return panel
