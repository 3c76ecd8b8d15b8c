"""Foreign objects on the belt: sticks, ropes and nets, bags. Each is a `Piece` like the lumps of coal.

All take the random generator, the canvas, the centre, the tone (reflectance) and the dust on them, 0..1.
"""

from collections.abc import Callable

import cv2
import numpy as np

from scenes.drawing import Array, Canvas, Piece, Point, Random, coat, turned, wave

# Colours of the clean material, BGR relative to grey; weather and dirt fade them.
WOOD = ((0.5, 0.88, 1.25), (0.68, 0.95, 1.15), (0.6, 0.8, 1.2))
FIBRE = ((0.6, 0.95, 1.2), (1.35, 1.0, 0.65), (0.85, 1.25, 0.75), (0.55, 0.85, 1.35))
PLASTIC = ((1.3, 1.05, 0.75), (1.15, 1.02, 0.9), (0.6, 1.0, 1.15), (0.85, 1.2, 0.85))


def faded(rng: Random, colours: tuple[tuple[float, float, float], ...]) -> Array:
    """One of the colours [3] BGR, more or less faded."""
    colour = np.array(colours[int(rng.integers(len(colours)))])
    return 1 + rng.uniform(0.35, 1.0) * (colour - 1) + rng.normal(0, 0.03, 3)


def curve(rng: Random, length: int, angle: float, bend: float, scale: float) -> Array:
    """A path [length, 2] of (x, y) about (0, 0), a pixel a step; its direction wanders by `bend` radians."""
    heading = angle + bend * wave(rng, length, scale)
    points = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    return points - points[length // 2]


def along(points: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Arc length and signed distance [h, w] of the pixels x, y to the nearest point of a path [N, 2]."""
    column = np.rint(points[:, 0] - x[0, 0]).astype(int)
    row = np.rint(points[:, 1] - y[0, 0]).astype(int)
    inside = (column >= 0) & (column < x.shape[1]) & (row >= 0) & (row < x.shape[0])
    column, row, index = column[inside], row[inside], np.flatnonzero(inside)
    empty = np.full(x.shape, 255, np.uint8)
    empty[row, column] = 0
    _, labels = cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    index_of_label = np.zeros(labels.max() + 1, int)
    index_of_label[labels[row, column]] = index
    nearest = index_of_label[labels]
    tangent = np.gradient(points, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6
    across, down = np.moveaxis(tangent[nearest], 2, 0)
    step_x, step_y = x - points[nearest, 0], y - points[nearest, 1]
    arc = nearest + step_x * across + step_y * down
    return np.float32(arc), np.float32(step_y * across - step_x * down)


def tube(distance: Array, width: Array | float) -> Array:
    """Height of a half cylinder of half-width `width` at a distance from its axis; 0 outside."""
    return width * np.sqrt(np.clip(1 - np.square(distance / width), 0, None))


def stick(rng: Random, canvas: Canvas, centre: Point, tone: float, dust: float) -> Piece:
    """A branch, a slat or a splinter of wood with the grain along its axis."""
    unit = canvas.unit
    length, width = int(rng.uniform(110, 430) * unit), rng.uniform(4.5, 17) * unit
    rows, columns, x, y = canvas.box(centre, 0.5 * length + 2 * width)
    points = curve(rng, length, rng.uniform(0, np.pi), rng.uniform(0.0, 0.12), 0.4 * length)
    arc, across = along(points, x, y)
    _, rough, fine = canvas.textures(rng, x, y)
    grain = canvas.texture("rough", rng, 0.1 * arc, 1.3 * across)

    taper = 1 - rng.uniform(0, 0.6) * np.linspace(0, 1, length)
    widths = width * taper * (1 + 0.08 * wave(rng, length, 0.15 * length) + 0.04 * wave(rng, length, 8 * unit))
    widths = widths[np.clip(arc, 0, length - 1).astype(int)]
    broken = rng.uniform(0.3, 1.5) * width * canvas.texture("rough", rng, 2 * across, 0 * across)
    shape = (np.abs(across) < widths) & (arc > broken) & (arc < length - 1 - broken)
    height = tube(across, widths) * rng.uniform(0.6, 1.0)
    if rng.random() < 0.35:  # a slat
        height = np.minimum(height, 0.45 * width)
    height = height + unit * (rng.uniform(0.4, 1.0) * grain + 0.3 * rough)
    shade = tone * (1 + 0.16 * grain + 0.06 * rough + 0.06 * fine)
    albedo = coat(shade, faded(rng, WOOD), dust * (0.8 + 0.3 * rough))
    return Piece(rows, columns, shape, np.float32(height), albedo)


def rope(rng: Random, canvas: Canvas, centre: Point, tone: float, dust: float) -> Piece:
    """A twisted rope, or a bundle of loose strands that wander about one path."""
    unit = canvas.unit
    length, width = int(rng.uniform(160, 520) * unit), rng.uniform(3.5, 11) * unit
    rows, columns, x, y = canvas.box(centre, 0.55 * length + 3 * width)
    points = curve(rng, length, rng.uniform(0, np.pi), rng.uniform(0.4, 1.1), rng.uniform(60, 160) * unit)
    arc, across = along(points, x, y)
    place = np.clip(arc, 0, length - 1).astype(int)
    if rng.random() < 0.5:
        height = tube(across, (width * (1 + 0.1 * wave(rng, length, 20 * unit)))[place])
        shape = height > 0
        twist = arc * np.pi / (rng.uniform(1.6, 2.6) * width) + rng.choice([-1.6, 1.6]) * across / width
        height = 0.8 * height + 0.35 * width * np.abs(np.sin(twist))
        fibre = canvas.texture("rough", rng, 4 * np.sin(twist), across + 0.3 * arc)
    else:
        height = np.zeros_like(x)
        for _ in range(int(rng.integers(4, 9))):
            offset = rng.normal(0, 0.9 * width) + 1.1 * width * wave(rng, length, rng.uniform(40, 120) * unit)
            thin = rng.uniform(0.2, 0.55) * width + unit
            height = np.maximum(height, tube(across - offset[place], thin) + 0.3 * thin * rng.random())
        shape = height > 0.35 * width
        fibre = canvas.texture("rough", rng, 0.12 * arc, 1.5 * across)
    _, rough, fine = canvas.textures(rng, x, y)
    shape &= (arc > 0) & (arc < length - 1 - width * np.abs(rough))
    height = height + unit * (0.6 * fibre + 0.5 * rough + 0.3 * fine)
    shade = tone * (1 + 0.16 * fibre + 0.08 * rough + 0.06 * fine)
    albedo = coat(shade, faded(rng, FIBRE), dust * (0.8 + 0.3 * rough))
    return Piece(rows, columns, shape, np.float32(height), albedo, drapes=True)


def net(rng: Random, canvas: Canvas, centre: Point, tone: float, dust: float) -> Piece:
    """A torn piece of mesh; its holes show what lies below."""
    unit = canvas.unit
    radius = rng.uniform(50, 110) * unit
    rows, columns, x, y = canvas.box(centre, 1.4 * radius)
    broad, rough, _ = canvas.textures(rng, x, y)
    u, v = turned(x, y, rng.uniform(0, np.pi))
    reach = np.hypot(u, v / rng.uniform(0.4, 0.9)) + 0.2 * radius * broad + 0.06 * radius * rough
    mesh, thick = rng.uniform(9, 18) * unit, rng.uniform(1.6, 2.8) * unit
    strands = []
    for side in (-1, 1):
        place = u + side * rng.uniform(0.3, 1.0) * v + 0.1 * radius * canvas.texture("broad", rng, x, y)
        strands.append(tube(np.mod(place, mesh) - mesh / 2, thick))
    height = np.maximum(*strands) + 0.5 * np.minimum(*strands)  # higher where they are knotted
    shape = (height > 0.3 * unit) & (reach < radius)
    height = height + unit * (2 + 2 * broad + 0.5 * rough)
    albedo = coat(tone * (1 + 0.14 * rough), faded(rng, FIBRE), dust * (0.8 + 0.3 * rough))
    return Piece(rows, columns, shape, np.float32(height), albedo, drapes=True)


def bag(rng: Random, canvas: Canvas, centre: Point, tone: float, dust: float) -> Piece:
    """A crumpled bag of woven or smooth plastic, some torn open, some translucent."""
    unit = canvas.unit
    radius = rng.uniform(45, 105) * unit
    rows, columns, x, y = canvas.box(centre, 1.5 * radius)
    broad, rough, fine = canvas.textures(rng, x, y)
    other = canvas.texture("broad", rng, x, y)
    u, v = turned(x, y, rng.uniform(0, np.pi))
    wide = v / rng.uniform(0.45, 0.95)
    corners = [turned(u, wide, angle)[0] for angle in np.arange(5) * 1.26 + rng.uniform(0, 0.8, 5)]
    reach = 0.5 * (np.hypot(u, wide) + np.maximum.reduce(corners)) / radius
    reach = reach + rng.uniform(0.1, 0.28) * broad + 0.03 * rough + 0.01 * fine
    shape = reach < 1
    if rng.random() < 0.25:  # torn open
        hole = np.hypot(0.6 * u, v - rng.uniform(0, 0.3) * radius) / radius + 0.15 * other + 0.05 * rough
        shape &= hole > rng.uniform(0.15, 0.35)

    u = u + 0.12 * radius * other
    v = v + 0.12 * radius * canvas.texture("broad", rng, x, y)
    height = 0.2 * radius * np.clip(1.05 - reach, 0, 0.6)
    creased = rng.random()
    for faces, depth in ((6, 0.35), (26, 0.3)):  # flat faces between creases, large and small
        places = np.float32(rng.uniform(-1.3 * radius, 1.3 * radius, (faces, 2)))
        near = np.partition([np.hypot(0.45 * (u - a), v - b) for a, b in places], 1, axis=0)
        height = height + creased * depth * (near[1] - near[0])
    for _ in range(3):  # bundles of folds that run together and die out
        period = rng.uniform(3, 11) * unit
        fold = 1 - np.abs(np.sin(turned(u, v, rng.normal(0, 0.35))[1] / period + 0.8 * broad))
        strength = np.clip(0.5 + 0.8 * canvas.texture("broad", rng, x, y), 0, 1.5)
        height = height + (1 - creased) * 0.8 * period * fold * strength
    if rng.random() < 0.5:  # woven tape
        thread = np.pi / (rng.uniform(2.2, 3.4) * unit)
        height = height + 0.4 * unit * np.sin(u * thread) * np.sin(v * thread)
    height = cv2.GaussianBlur(np.float32(height), (0, 0), 0.7 * unit) + unit * (0.3 * rough + 0.15 * fine)
    shade = tone * (1 + 0.08 * rough + 0.06 * broad + 0.05 * fine)
    albedo = coat(shade, faded(rng, PLASTIC), dust * (0.8 + 0.3 * broad))
    opacity = rng.uniform(0.6, 0.9) if rng.random() < 0.2 else 1.0
    return Piece(rows, columns, shape, height, albedo, rng.uniform(0.0, 0.4), opacity, drapes=True)


DEFECTS: dict[str, tuple[Callable[..., Piece], ...]] = {"stick": (stick,), "rope": (rope, rope, net), "bag": (bag,)}
