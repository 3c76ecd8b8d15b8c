"""Drawn frames of a coal belt, a relief onto which pieces are laid: coal and, if asked for, a foreign object."""

import contextlib
from dataclasses import dataclass

import cv2
import numpy as np

from scenes.defects import DEFECTS
from scenes.drawing import Array, Canvas, OutOfFrame, Piece, Random, fractal, lump, wave

LEAST_VISIBLE = 0.0025  # of the frame, and half of the defect; a defect that shows less is laid on top of the coal


@dataclass
class Relief:
    """What the camera looks at. `support` is what pieces come to rest on: the coal, not the defect."""

    height: Array  # [H, W] pixels above the belt
    albedo: Array  # [H, W, 3] BGR
    gloss: Array  # [H, W]
    support: Array  # [H, W]
    mask: Array  # [H, W] bool, the visible pixels of the defect

    def lay(self, piece: Piece, unit: float, defect: bool = False) -> None:
        """Put `piece` on top of everything."""
        window, shape = (piece.rows, piece.columns), piece.shape
        rest = self.support[window]
        below = cv2.GaussianBlur(rest, (0, 0), 8 * unit) if piece.drapes else rest[shape].mean()
        top = np.float32(0.7) * below + piece.height
        self.height[window] = np.where(shape, top, self.height[window])
        if not defect:
            self.support[window] = np.where(shape, top, rest)
        cover = (shape * np.float32(piece.opacity))[..., None]
        self.albedo[window] = cover * piece.albedo + (1 - cover) * self.albedo[window]
        self.gloss[window] = np.where(shape, np.float32(piece.gloss), self.gloss[window])
        self.mask[window] = np.where(shape, defect, self.mask[window])


def draw_belt(rng: Random, canvas: Canvas) -> Relief:
    """A worn belt running down the frame: streaks, side strip, fines, specks, wet patches, maybe a joint."""
    size, unit = canvas.size, canvas.unit
    shape = (size, size)
    fine = rng.standard_normal(shape, dtype=np.float32)
    mottle = fractal(rng, shape, 90 * unit, octaves=3)
    blotch = fractal(rng, shape, (13 * unit, 9 * unit), octaves=3)
    streaks = fractal(rng, shape, (260 * unit, 1.5)) + fractal(rng, shape, (500 * unit, 14 * unit), octaves=2)
    tone = rng.uniform(0.68, 0.88) * (1 + 0.05 * mottle + 0.03 * streaks + 0.035 * blotch + 0.03 * fine)

    # Under the skirt at one side the belt stays smooth; fines gather along the edge of that strip.
    edge = size * (rng.uniform(0.1, 0.4) if rng.random() < 0.75 else -0.2)
    from_edge = np.arange(size) - edge - 5 * unit * wave(rng, size, 60 * unit, octaves=2)[:, None]
    strip = np.float32(1 / (1 + np.exp(np.clip(from_edge / (2.5 * unit), -30, 30))))
    tone *= 1 - strip * rng.uniform(0.15, 0.35)
    band = np.exp(-np.square((from_edge - 5 * unit) / (rng.uniform(6, 24) * unit)))
    band *= 0.7 + 0.7 * wave(rng, size, 70 * unit, octaves=2)[:, None]

    heaps = np.clip(fractal(rng, shape, 110 * unit, octaves=2) - rng.uniform(0.9, 2.2), 0, 1)
    density = rng.uniform(-0.3, 0.4) + 1.2 * heaps - 0.9 * strip + rng.uniform(0.3, 2.2) * band
    density += 0.5 * mottle + 0.4 * blotch
    grains = np.zeros(shape, np.float32)
    for scale, rarity in ((2.4, 2.5), (4.5, 2.7), (9.0, 3.2)):
        speck = fractal(rng, shape, scale * unit, octaves=2) + 0.2 * fine - rarity + density
        grains = np.maximum(grains, np.clip(2.5 * speck, 0, 1) * np.sqrt(scale))
    tone += np.clip(grains, 0, 1) * (rng.uniform(0.14, 0.32) - tone)

    wet = np.clip(1.5 * (fractal(rng, shape, (170 * unit, 90 * unit), octaves=3) - rng.uniform(1.0, 2.4)), 0, 1)
    smear = np.clip(2 * (fractal(rng, shape, (9 * unit, 26 * unit), octaves=2) - 2.4), 0, 1)
    tone *= 1 - 0.28 * wet - 0.3 * smear
    height = np.float32(unit) * (0.12 * fine + 0.3 * mottle + 0.9 * grains)
    if rng.random() < 0.2:
        lay_joint(rng, canvas, height, tone)
    layers = [height, np.repeat(tone[..., None], 3, axis=2), 0.6 * wet]
    if rng.random() < 0.5:  # the strip lies on the other side
        layers = [layer[:, ::-1] for layer in layers]
    layers = [np.ascontiguousarray(layer, np.float32) for layer in layers]
    return Relief(*layers, np.zeros(shape, np.float32), np.zeros(shape, bool))


def lay_joint(rng: Random, canvas: Canvas, height: Array, tone: Array) -> None:
    """Draw a joint across the belt into `height` and `tone` [H, W]: a lip, the torn cover beside it, dirt."""
    size, unit = canvas.size, canvas.unit
    row = np.arange(size)[:, None]
    middle = rng.uniform(0.1, 0.9) * size + 2 * unit * wave(rng, size, 120 * unit, octaves=2)
    torn = middle - unit * (11 + 3 * wave(rng, size, 60 * unit, octaves=4))
    dirt = np.clip(0.6 + 0.5 * fractal(rng, (size, size), (20 * unit, 30 * unit), octaves=3), 0, 1.5)
    lip = np.exp(-np.square((row - middle) / (2 * unit)))
    rim = dirt * np.exp(-np.square((row - torn) / (2 * unit)))
    between = dirt / (1 + np.exp(np.clip(torn - row, -20, 20))) * (row < middle)
    height += unit * (2.5 * lip - 2 * between)
    tone *= 1 - 0.25 * between - 0.35 * rim + 0.12 * lip


def draw_coal(rng: Random, canvas: Canvas) -> list[Piece]:
    """The lumps of a frame in the order in which they fell: a few heaps, some single lumps, sometimes a light stone."""
    size, unit = canvas.size, canvas.unit
    heaps = rng.uniform(0.05, 0.95, (int(rng.integers(1, 4)), 2)) * size
    tone, dust = rng.uniform(0.2, 0.36), rng.uniform(-0.1, 0.4)
    pieces = []
    for _ in range(int(rng.integers(6, 22))):
        radius = np.clip(rng.lognormal(np.log(45), 0.36), 11, 85) * unit
        x, y = rng.uniform(-0.05, 1.05, 2) * size
        if rng.random() < 0.65:
            x, y = rng.choice(heaps) + rng.normal(0, 75 * unit, 2)
        stone = rng.uniform(0.6, 0.85) if rng.random() < 0.03 else tone * rng.uniform(0.8, 1.25)
        settled = np.clip(dust + rng.normal(0, 0.1), 0, 0.8)
        with contextlib.suppress(OutOfFrame):
            pieces.append(lump(rng, canvas, (x, y), radius, stone, settled))
    return pieces


def draw_defect(rng: Random, canvas: Canvas, kind: str, coal: list[Piece]) -> tuple[Piece, int]:
    """A defect, and how many lumps lie below it. Most defects are as dark as coal, some are discoloured."""
    least = LEAST_VISIBLE * canvas.size**2
    while True:
        draw = DEFECTS[kind][int(rng.integers(len(DEFECTS[kind])))]
        tone = rng.uniform(0.2, 0.42) if rng.random() < 0.75 else rng.uniform(0.42, 0.7)
        x, y = rng.uniform(0.15, 0.85, 2) * canvas.size
        if coal and rng.random() < 0.5:  # beside or below a lump
            beside = coal[int(rng.integers(len(coal)))]
            x, y = (x + 3 * beside.columns.stop) / 4, (y + 3 * beside.rows.stop) / 4
        piece = draw(rng, canvas, (x, y), tone, rng.uniform(0, 0.45))
        if piece.shape.sum() < 1.5 * least:
            continue
        below = int(rng.integers(0, len(coal) + 1))
        visible = np.zeros((canvas.size, canvas.size), bool)
        visible[piece.rows, piece.columns] = piece.shape
        for later in coal[below:]:
            visible[later.rows, later.columns] &= ~later.shape
        hidden = visible.sum() < max(least, 0.5 * piece.shape.sum())
        return piece, len(coal) if hidden else below


def strew_crumbs(rng: Random, canvas: Canvas, relief: Relief) -> None:
    """Strew bright crumbs of stone over everything."""
    size, unit = canvas.size, canvas.unit
    crumbs = np.zeros((size, size), np.float32)
    places = rng.integers(0, size, (int(rng.integers(20, 140)), 2))
    stays = relief.support[places[:, 1], places[:, 0]] > rng.uniform(0, 6, len(places)) * unit  # most on coal
    for place in places[stays]:
        axes = [max(1, round(value * unit)) for value in np.clip(rng.lognormal(0.1, 0.5, 2), 0, 4)]
        cv2.ellipse(crumbs, place.tolist(), axes, rng.uniform(0, 180), 0, 360, rng.uniform(0.2, 1.0) ** 2, -1)
    bright = np.array([0.8, 0.92, 1.0], np.float32) * np.float32(rng.uniform(1.0, 1.8))
    relief.albedo += crumbs[..., None] * (bright - relief.albedo)
    relief.height += np.float32(1.2 * unit) * crumbs


def light(rng: Random, canvas: Canvas, relief: Relief) -> Array:
    """Radiance [H, W, 3] of the relief under one lamp and a bright ceiling."""
    size, unit = canvas.size, canvas.unit
    angle, rise = rng.uniform(0, 2 * np.pi), rng.uniform(0.9, 1.5)
    lamp = np.float32([np.cos(angle), np.sin(angle), rise]) / np.float32(np.hypot(1, rise))
    height = cv2.GaussianBlur(relief.height, (0, 0), 0.7)
    slope_x = np.clip(cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8), -2.5, 2.5)
    slope_y = np.clip(cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8), -2.5, 2.5)
    facing = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    direct = np.clip((lamp[2] - lamp[0] * slope_x - lamp[1] * slope_y) * facing, 0, None) / lamp[2]

    # Hollows and places beside lumps get less light from the ceiling, places behind lumps less from the lamp.
    small = cv2.resize(height, (size // 2, size // 2), interpolation=cv2.INTER_AREA)
    hollow, shadow = np.zeros_like(small), np.zeros_like(small)
    for spread, weight in ((3, 0.7), (8, 0.7), (20, 0.35)):
        around = cv2.GaussianBlur(small, (0, 0), spread * unit / 2)
        hollow += weight * np.clip((around - small) / (spread * unit), 0, 1)
    for distance in (2, 4, 7, 11, 16):
        move = np.float32([[1, 0, -lamp[0] * distance * unit / 2], [0, 1, -lamp[1] * distance * unit / 2]])
        blocker = cv2.warpAffine(small, move, small.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        shadow = np.maximum(shadow, np.clip((blocker - small - distance * unit * rise) / (3 * unit), 0, 1))
    shadow = cv2.GaussianBlur(shadow, (0, 0), 1.5 * unit)
    hollow, shadow = cv2.resize(hollow, (size, size)), cv2.resize(shadow, (size, size))

    ambient = np.float32(rng.uniform(0.35, 0.6))
    level = ambient * (0.5 + 0.5 * facing) * np.exp(-1.4 * hollow)
    level += (1 - ambient) * direct * (1 - 0.8 * shadow)
    level *= 1 + np.clip(0.12 / unit * (height - cv2.GaussianBlur(height, (0, 0), 2.5 * unit)), -0.35, 0.4)  # wear
    half = lamp + np.float32([0, 0, 1])
    half /= np.linalg.norm(half)
    mirror = np.clip((half[2] - half[0] * slope_x - half[1] * slope_y) * facing, 0, 1) ** 24
    return relief.albedo * level[..., None] + (0.35 * relief.gloss * mirror * (1 - shadow))[..., None]


def photograph(rng: Random, canvas: Canvas, radiance: Array) -> Array:
    """The camera's picture [H, W, 3] uint8: uneven light, blur of lens and motion, noise, black level."""
    size, unit = canvas.size, canvas.unit
    across = np.linspace(-1, 1, size, dtype=np.float32)
    down = across[:, None]
    middle, tilt = rng.uniform(-0.5, 0.5, 2), rng.normal(0, 0.08, 2)
    falloff = 1 - rng.uniform(0.08, 0.25) * ((across - middle[0]) ** 2 + (down - middle[1]) ** 2)
    falloff = np.clip(falloff + tilt[0] * across + tilt[1] * down, 0.6, None)
    gain = rng.uniform(112, 145) * (np.array([0.9, 0.89, 1.0]) + rng.normal(0, 0.015, 3))
    picture = radiance * np.float32(falloff[..., None] * gain)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.65, 1.1))
    picture = cv2.blur(picture, (1, int(rng.integers(1, max(2, round(4 * unit)) + 1))))
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    noise = 0.6 * noise + 0.9 * cv2.GaussianBlur(noise, (0, 0), 0.7)
    picture += noise * np.sqrt(1.2 + 0.02 * np.clip(picture, 0, None)) * np.float32(rng.uniform(0.8, 1.3))
    picture += np.float32([4, 15, 8]) * np.float32(rng.uniform(0.8, 1.2))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


class Scene:
    """A frame to be drawn. Each part has its own random numbers, so belt and coal do not depend on the defect."""

    def __init__(self, seed: tuple[int, ...], size: int) -> None:
        parts = ("canvas", "belt", "coal", "defect", "crumbs", "light", "camera")
        self._random = {part: np.random.default_rng([*seed, number]) for number, part in enumerate(parts)}
        self._canvas = Canvas(self._random["canvas"], size)

    def build(self, kind: str | None) -> Relief:
        """The relief with a defect of `kind` (a key of DEFECTS) or without one. A scene is built once."""
        canvas, random = self._canvas, self._random
        relief = draw_belt(random["belt"], canvas)
        layers = [(piece, False) for piece in draw_coal(random["coal"], canvas)]
        if kind:
            defect, below = draw_defect(random["defect"], canvas, kind, [piece for piece, _ in layers])
            layers.insert(below, (defect, True))
        for piece, is_defect in layers:
            relief.lay(piece, canvas.unit, is_defect)
        strew_crumbs(random["crumbs"], canvas, relief)
        return relief

    def photograph(self, relief: Relief) -> Array:
        """The picture [H, W, 3] BGR uint8 of a relief."""
        return photograph(self._random["camera"], self._canvas, light(self._random["light"], self._canvas, relief))


def draw_scene(seed: tuple[int, ...], size: int, kind: str | None = None) -> tuple[Array, Array]:
    """A frame [H, W, 3] BGR uint8 and its mask [H, W] uint8, 255 where a defect of `kind`, if any, is visible.

    A seed gives always the same frame, and without a `kind` the same one without the defect.
    """
    scene = Scene(seed, size)
    relief = scene.build(kind)
    return scene.photograph(relief), relief.mask.astype(np.uint8) * 255
