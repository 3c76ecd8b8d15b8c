"""What drawn scenes are made of: noise, pieces and lumps of coal. Lengths are pixels, colours are BGR.

A `Piece` is neither lit nor blurred: a defect gets the same light, edges and noise as the coal around it.
"""

from dataclasses import dataclass

import cv2
import numpy as np

DUST = 0.7  # reflectance of settled stone dust, close to the worn belt's

Point = tuple[float, float]
Array = np.ndarray
Random = np.random.Generator


class OutOfFrame(Exception):
    """No part of a piece would lie in the frame."""


@dataclass
class Piece:
    """One thing on the belt. `rows` and `columns` say where its arrays [h, w] lie in the frame."""

    rows: slice
    columns: slice
    shape: Array  # [h, w] bool
    height: Array  # [h, w] above what it rests on
    albedo: Array  # [h, w, 3]
    gloss: float = 0.05
    opacity: float = 1.0
    drapes: bool = False  # it follows what lies below; otherwise it is stiff


def fractal(rng: Random, shape: tuple[int, int], scale: float | Point, octaves: int = 1) -> Array:
    """Smooth noise [h, w] of about unit deviation; its largest features measure `scale` or (down, across)."""
    down, across = scale if isinstance(scale, tuple) else (scale, scale)
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        rows = max(2, round(shape[0] / max(down, 1.0)) + 1)
        columns = max(2, round(shape[1] / max(across, 1.0)) + 1)
        grid = rng.standard_normal((rows, columns), dtype=np.float32)
        total += 0.6**octave * cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
        down, across = down / 2, across / 2
    return total / np.float32(0.8 * np.sqrt(sum(0.36**octave for octave in range(octaves))))


def wave(rng: Random, length: int, scale: float, octaves: int = 1) -> Array:
    """Smooth noise [length] of about unit deviation."""
    return fractal(rng, (2, max(length, 2)), (2.0, scale), octaves)[0, :length]


def turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """The coordinates x, y in axes rotated by `angle`."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


class Canvas:
    """What the pieces of a frame share: its size, the unit (1 at 512 pixels), noise to take textures from."""

    def __init__(self, rng: Random, size: int) -> None:
        self.size = size
        self.unit = size / 512
        self._tiles = {
            "broad": fractal(rng, (size, size), 60 * self.unit, octaves=2),
            "rough": fractal(rng, (size, size), 14 * self.unit, octaves=4),
            "fine": fractal(rng, (size, size), 3.5 * self.unit, octaves=2),
        }

    def box(self, centre: Point, radius: float) -> tuple[slice, slice, Array, Array]:
        """Rows, columns and coordinates x, y [h, w] about its centre of a square in the frame; raises OutOfFrame."""
        x, y = centre
        left, right = max(int(x - radius), 0), min(int(x + radius) + 1, self.size)
        top, bottom = max(int(y - radius), 0), min(int(y + radius) + 1, self.size)
        if right - left < 3 or bottom - top < 3:
            raise OutOfFrame
        across, down = np.meshgrid(np.arange(left, right), np.arange(top, bottom))
        return slice(top, bottom), slice(left, right), np.float32(across - x), np.float32(down - y)

    def texture(self, tile: str, rng: Random, x: Array, y: Array) -> Array:
        """Noise of a tile (broad, rough, fine) at x, y [h, w], from a random start; the tile repeats mirrored."""
        shift = rng.uniform(0, self.size, 2)
        across, down = np.float32(x + shift[0]), np.float32(y + shift[1])
        return cv2.remap(self._tiles[tile], across, down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    def textures(self, rng: Random, x: Array, y: Array) -> tuple[Array, Array, Array]:
        """Broad, rough and fine noise at x, y [h, w]."""
        return tuple(self.texture(tile, rng, x, y) for tile in self._tiles)


def coat(shade: Array, tint: Array, settled: Array) -> Array:
    """Albedo [h, w, 3] of grey `shade` [h, w] and colour `tint` [3], a share `settled` under dust."""
    albedo = shade[..., None] * tint
    return np.float32(albedo + np.clip(settled, 0, 0.8)[..., None] * (DUST - albedo))


def lump(rng: Random, canvas: Canvas, centre: Point, radius: float, tone: float, dust: float) -> Piece:
    """A stone: the lower envelope of random planes, warped and worn. Dust (0..1) lies where it is flat."""
    rows, columns, x, y = canvas.box(centre, 1.35 * radius)
    unit = canvas.unit
    broad, rough, fine = canvas.textures(rng, x, y)
    u, v = turned(x, y, rng.uniform(0, np.pi))
    v = v / rng.uniform(0.42, 0.95) + 0.04 * radius * broad + unit * (1.3 * rough + 0.3 * fine)
    u = u + 0.04 * radius * canvas.texture("broad", rng, x, y) + 0.025 * radius * rough

    sides = int(rng.integers(6, 11))
    height = np.full_like(x, np.inf)
    for side in range(sides):
        angle = 2 * np.pi * (side + rng.uniform(-0.35, 0.35)) / sides
        height = np.minimum(height, rng.uniform(0.4, 1.7) * (radius * rng.uniform(0.78, 1.05) - turned(u, v, angle)[0]))
    peak = radius * rng.uniform(0.25, 0.5)
    for _ in range(int(rng.integers(2, 5))):
        height = np.minimum(height, peak + rng.uniform(0.1, 0.7) * turned(u, v, rng.uniform(0, 2 * np.pi))[0])
    shape = height > 0
    if not shape.any():
        raise OutOfFrame
    flat = height > 0.6 * peak
    grit = rng.uniform(0.4, 1.3)
    height = cv2.GaussianBlur(np.float32(np.maximum(height, 0)), (0, 0), rng.uniform(0.7, 2.0) * unit)
    height += unit * grit * (rough + 0.35 * fine) + 0.02 * radius * broad
    if rng.random() < 0.4:  # bedding: parallel layers break in steps
        height += 0.02 * radius * np.abs(np.sin(u * rng.uniform(4, 12) / radius + broad))

    shade = tone * (1 + 0.08 * rough + 0.06 * broad + 0.06 * grit * fine)
    settled = dust * (0.8 + 0.2 * broad + 0.12 * rough) * np.where(flat, 1.0, 0.55)
    tint = 1 + rng.normal(0, 0.015, 3)
    if rng.random() < 0.08:  # rusty
        tint *= (0.95, 0.99, 1.03)
    gloss = rng.uniform(0.5, 1.0) if rng.random() < 0.12 else rng.uniform(0.0, 0.2)
    return Piece(rows, columns, shape, height, coat(shade, tint, settled), gloss)
