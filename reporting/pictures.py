"""Pictures of frames and maps, uint8 RGB: colours, outlines, panels under captions, files."""

import io
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.files import atomic_write

COLORS = cv2.COLORMAP_INFERNO  # even in lightness, so that it reads without colour vision and in print
LIGHT, DARK, AMBER = (235, 235, 235), (32, 32, 32), (255, 190, 60)
HEADER = 22  # pixels of a line of text
MAX_BORDERS, MAX_POINTS = 40, 300  # of an outline
QUALITIES = (80, 60, 40, 20)  # of WebP; the first whose bytes fit is taken


def color_scale(pixels: np.ndarray) -> tuple[float, float]:
    """The range of the colours, common to all images: median to 99.9th percentile of the pixels [N]."""
    low, high = np.percentile(pixels, (50, 99.9)).tolist()
    return low, max(high, low + 1e-12)


def colorize(anomaly_map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Map [H, W] -> picture [H, W, 3]."""
    levels = np.interp(anomaly_map, scale, (0, 255))
    return cv2.applyColorMap(levels.astype(np.uint8), COLORS)[..., ::-1]


def text_line(text: str, width: int, color: tuple[int, int, int] = LIGHT) -> np.ndarray:
    """Text on a dark line [HEADER, width, 3]; OpenCV before 5 has ASCII alone, and the rest becomes escapes."""
    line = np.full((HEADER, width, 3), DARK, np.uint8)
    encoding = "utf-8" if hasattr(cv2, "FontFace") else "ascii"
    text = text.encode(encoding, "backslashreplace").decode()
    return cv2.putText(line, text, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1, cv2.LINE_AA)


def panels(captioned: Iterable[tuple[str, np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """Pictures side by side, each of `size` (w, h) under its caption."""
    framed = []
    for caption, picture in captioned:
        shown = padded(cv2.resize(picture, size), (0, 2, 2, 2))
        framed.append(np.vstack([text_line(caption, shown.shape[1]), shown]))
    return np.hstack(framed)


def padded(picture: np.ndarray, margins: tuple[int, int, int, int]) -> np.ndarray:
    """The picture with dark margins of so many pixels (top, bottom, left, right)."""
    return cv2.copyMakeBorder(picture, *margins, cv2.BORDER_CONSTANT, value=DARK)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a .png or .jpg, atomically (through memory, since OpenCV cannot open every path on Windows)."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if path.suffix == ".jpg" else []
    data = cv2.imencode(path.suffix, picture[..., ::-1], options)[1]
    with atomic_write(path) as temporary:
        temporary.write_bytes(data.tobytes())


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size (w, h) of a picture that is made as small as `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def encode(picture: np.ndarray, budget: int) -> bytes:
    """The picture as WebP of at most `budget` bytes, at lower quality and resolution if need be."""
    while True:
        for quality in QUALITIES:
            data = io.BytesIO()
            # Method 1 takes a third of the time of the default, 4, for a tenth more bytes.
            Image.fromarray(picture).save(data, "WEBP", quality=quality, method=1)
            if data.tell() <= budget or max(picture.shape[:2]) < 16:
                return data.getvalue()
        picture = cv2.resize(picture, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)


def outline(region: np.ndarray, size: tuple[int, int]) -> list[list[list[float]]]:
    """The borders of a bool region [H, W], holes included: loops of points (x, y) in a frame of `size` (w, h).

    The longest borders are taken, and as exactly as MAX_POINTS allow.
    """
    borders, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scale = np.array([size[0] / region.shape[1], size[1] / region.shape[0]])
    longest = sorted(borders, key=len, reverse=True)[:MAX_BORDERS]
    scaled = [((border + 0.5) * scale).astype(np.float32) for border in longest]
    tolerance = 0.6  # pixels of the frame
    while True:
        loops = [cv2.approxPolyDP(border, tolerance, True)[:, 0].round(1).tolist() for border in scaled]
        if sum(map(len, loops)) <= MAX_POINTS:
            return loops
        tolerance *= 2


def draw_outline(picture: np.ndarray, loops: list[list[list[float]]], color: tuple[int, int, int]) -> np.ndarray:
    """A copy of the picture with the loops of an outline of its size."""
    lines = [np.round(loop).astype(np.int32) for loop in loops]
    return cv2.polylines(picture.copy(), lines, True, color, 2, cv2.LINE_AA)
