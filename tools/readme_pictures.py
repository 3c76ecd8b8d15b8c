"""Make the README's pictures from the results of `./run.sh --demo`.

python -m tools.readme_pictures        # docs/images/scenes.jpg and detections.jpg
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from models import USAD
from reporting.visualize import colorize

DATA = Path("data/coal_demo")
IMAGES = Path("docs/images")
SCENES = ("good/001", "good/004", "stick/001", "rope/010", "bag/003", "rope/002")
DETECTIONS = ("stick/003", "rope/010", "bag/004", "bag/014")  # the last is missed
COLUMNS = ("input", "MACLU", "MA2Patch", "PatchCore", "fused, regions", "ground truth")
SIDE, GAP, HEADER = 240, 4, 26


def main() -> None:
    scenes = [brightened(outlined(name)) for name in SCENES]
    write("scenes.jpg", grid([scenes[:3], scenes[3:]], 320))
    usad = USAD.load("saved_models/coal_demo")
    paths = [DATA / "test" / f"{name}.png" for name in DETECTIONS]
    predictions = usad(paths)
    parts = {"fusion": [p.map for p in predictions]}
    parts |= {branch.name: [p.branches[branch.name][1] for p in predictions] for branch in usad.branches}
    rows = []
    for index, (name, path) in enumerate(zip(DETECTIONS, paths, strict=True)):
        frame = cv2.imread(str(path))
        columns = [brightened(frame)]
        columns += [heat(parts[branch.name], index) for branch in usad.branches]
        fused, regions = heat(parts["fusion"], index), parts["fusion"][index] >= usad.pixel_threshold
        columns += [contour(fused, regions, (255, 255, 255)), brightened(outlined(name))]
        rows.append(columns)
    picture = grid(rows, SIDE)
    header = np.full((HEADER, picture.shape[1], 3), 255, np.uint8)
    for column, title in enumerate(COLUMNS):
        place = (column * (SIDE + GAP) + 4, HEADER - 8)
        cv2.putText(header, title, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)
    write("detections.jpg", np.vstack([header, picture]))


def heat(maps: list[np.ndarray], index: int) -> np.ndarray:
    """A map in colour [H, W, 3] BGR; the scale is common to the part's maps."""
    values = np.stack([cv2.resize(one, (512, 512)) for one in maps])
    return colorize(values[index], (float(np.quantile(values, 0.02)), float(np.quantile(values, 0.998))))


def outlined(name: str) -> np.ndarray:
    """A test frame [H, W, 3] BGR with its defect's contour."""
    frame = cv2.imread(str(DATA / "test" / f"{name}.png"))
    mask = DATA / "ground_truth" / f"{name}_mask.png"
    return contour(frame, cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE) > 0, (0, 165, 255)) if mask.exists() else frame


def contour(picture: np.ndarray, region: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    found, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(picture.copy(), found, -1, colour, 2, cv2.LINE_AA)


def brightened(picture: np.ndarray) -> np.ndarray:
    return np.clip(picture * 1.5, 0, 255).astype(np.uint8)


def grid(rows: list[list[np.ndarray]], side: int) -> np.ndarray:
    cells = [[cv2.resize(cell, (side, side), interpolation=cv2.INTER_AREA) for cell in row] for row in rows]
    framed = [[cv2.copyMakeBorder(c, 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=(255,) * 3) for c in r] for r in cells]
    return np.vstack([np.hstack(row) for row in framed])


def write(name: str, picture: np.ndarray) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(IMAGES / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
