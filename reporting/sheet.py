"""sheet.jpg: the worst misses, the worst false alarms and some hits of a test, with the maps of every part."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from reporting.gallery import Gallery, Kept
from reporting.pictures import AMBER, LIGHT, colorize, draw_outline, padded, panels, text_line, write_picture
from reporting.report import Threshold, alarms_of, color_scales, kind_of, part_title

MOST = {"miss": 8, "false alarm": 8, "hit": 4}  # rows
WIDTH, HEIGHT = 300, 200  # within which a panel fits
TRUTH, REGION = (86, 208, 255), (90, 255, 140)
Scales = Mapping[str, tuple[float, float]]


def write_sheet(path: Path, title: str, gallery: Gallery, threshold: Threshold) -> None:
    """Write the sheet, atomically. What is farthest on the wrong side of the threshold comes first."""
    rows = list(chosen(gallery.by_score(), threshold))
    wrong = [item for kind, item in rows if kind != "hit"]
    scales = color_scales(wrong or [item for _, item in rows])  # hits may be too bright for anything else to be seen
    lines = [text_line(text, 1000) for text in heading(title, gallery, threshold)]
    for kind, item in rows:
        text = f"{kind.upper()}   score {item.entry.score:.4g}   {item.entry.name}"  # a long name is cut off
        pictures = row(item, scales, threshold.pixel)
        lines += [text_line(text, 1000, LIGHT if kind == "hit" else AMBER), pictures]
    width = max(line.shape[1] for line in lines)
    write_picture(path, np.vstack([padded(line, (0, 0, 0, width - line.shape[1])) for line in lines]))


def heading(title: str, gallery: Gallery, threshold: Threshold) -> list[str]:
    """What happened, and what the sheet shows, in three lines."""
    anomalous, alarms = np.asarray(gallery.labels) == 1, alarms_of(gallery, threshold) == 1
    missed, false_alarms = (anomalous & ~alarms).sum(), (~anomalous & alarms).sum()
    where = ", on these test images" if threshold.on_test_set else ""
    return [
        f"{title}: {missed} of {anomalous.sum()} anomalous images missed, "
        f"{false_alarms} false alarms among {(~anomalous).sum()} normal images",
        f"Threshold {threshold.score:.4g}: {threshold.source}{where}",
        "The worst misses, the worst false alarms, some hits. Blue: ground truth. Green: fused map at its threshold.",
    ]


def chosen(kept: Sequence[Kept], threshold: Threshold) -> Iterator[tuple[str, Kept]]:
    """The images that get a row, with what became of them; hits from the weakest to the strongest."""
    for kind, most in MOST.items():
        own = [item for item in kept if kind_of(item.entry, threshold).endswith(f" {kind}")]
        if kind != "false alarm":
            own.reverse()  # lowest score first
        places = range(len(own))
        if kind == "hit" and own:
            places = np.unique(np.linspace(0, len(own) - 1, most).round().astype(int))
        for place in places[:most]:
            yield kind, own[place]


def row(item: Kept, scales: Scales, pixel_threshold: float | None) -> np.ndarray:
    """The frame, the fused map and those of the branches, side by side."""
    frame = cv2.imdecode(np.frombuffer(item.frame, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    captioned = [("input", draw_outline(cv2.resize(frame, item.size), item.truth, TRUTH))]
    for part, anomaly_map in item.maps.items():
        heat = colorize(cv2.resize(anomaly_map, item.size), scales[part])
        if len(captioned) == 1 and pixel_threshold is not None:
            heat = draw_outline(heat, item.contour(pixel_threshold), REGION)
        captioned.append((f"{part_title(part)} {item.entry.scores[part]:.4g}", heat))
    scale = min(WIDTH / item.size[0], HEIGHT / item.size[1])
    return panels(captioned, (max(96, round(scale * item.size[0])), max(24, round(scale * item.size[1]))))
