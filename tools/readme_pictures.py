"""Make the README's pictures from the results of `./run.sh --demo`.

python -m tools.readme_pictures        # docs/images/scenes.jpg and detections.jpg
"""

from functools import partial
from pathlib import Path

import cv2
import numpy as np

from datasets.mvtec import Category, Sample
from models import USAD
from reporting.gallery import Entry, Gallery, Pictures
from reporting.pictures import draw_outline, outline, panels, write_picture
from reporting.report import color_scales
from reporting.sheet import row

IMAGES = Path("docs/images")
SCENES = ("good/001", "good/004", "stick/001", "rope/010", "bag/003", "rope/002")
DETECTIONS = ("stick/003", "rope/010", "bag/004", "bag/014")  # the last is missed
SIDE, TRUTH = 320, (255, 165, 0)


def main() -> None:
    samples = {sample.name[5:-4]: sample for sample in Category("data", "coal_demo").test_samples()}
    scenes = [(name, outlined(samples[name])) for name in SCENES]
    rows = [panels(scenes[start : start + 3], (SIDE, SIDE)) for start in (0, 3)]
    write_picture(IMAGES / "scenes.jpg", np.vstack(rows))
    usad, gallery = USAD.load("saved_models/coal_demo"), Gallery()
    for sample in (samples[name] for name in DETECTIONS):
        (found,) = usad(sample.path)
        maps = {"fusion": found.map} | {name: branch_map for name, (_, branch_map) in found.branches.items()}
        scores = {"fusion": found.score} | {name: score for name, (score, _) in found.branches.items()}
        frame, defect = shown(sample)
        gallery.add(Entry(sample.name, scores), partial(Pictures, frame, maps, defect))
    kept = sorted(gallery.by_score(), key=lambda item: DETECTIONS.index(item.entry.name[5:-4]))
    scales = color_scales(kept)
    write_picture(IMAGES / "detections.jpg", np.vstack([row(item, scales, usad.pixel_threshold) for item in kept]))


def shown(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """The brightened frame [H, W, 3] and its defect [H, W]."""
    picture = sample.read()
    frame = np.clip(np.asarray(picture.image) * 1.5, 0, 255).astype(np.uint8)
    return frame, sample.read_mask(picture.size)[0] if sample.masks else np.zeros(frame.shape[:2], bool)


def outlined(sample: Sample) -> np.ndarray:
    """The brightened frame [SIDE, SIDE, 3] with its defect's outline."""
    frame, defect = shown(sample)
    small = cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return draw_outline(small, outline(defect, (SIDE, SIDE)), TRUTH)


if __name__ == "__main__":
    main()
