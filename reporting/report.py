"""report.html: figures, curves, histogram and pictures in one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metrics import protocols
from metrics.pixel import FPR_LIMIT
from reporting import charts
from reporting.gallery import Entry, Gallery, Kept, Loops
from reporting.pictures import color_scale, colorize, encode
from utils.files import atomic_write

if TYPE_CHECKING:
    from jinja2 import Environment

HEADLINES = ("image_auroc", "pixel_auroc", "aupro")
TITLES = {"fusion": "Fused", "ma_clu": "MACLU", "ma2patch": "MA2Patch", "pc": "PatchCore"}
KINDS = {  # what became of an image, by label (None: unknown): without an alarm, with one, without a threshold
    1: ("○ miss", "● hit", "● anomalous"),
    0: ("– normal", "▲ false alarm", "– normal"),
    None: ("– no alarm", "▲ alarm", "– not rated"),
}
CHARTS = (  # key in `Curves`, title, the figure of metrics.json that sums it up, axes, where x ends
    ("image_roc", "Image ROC", "image_auroc", "false positive rate", "true positive rate", 1.0),
    ("image_pr", "Image precision–recall", "image_ap", "recall", "precision", 1.0),
    ("pixel_roc", "Pixel ROC", "pixel_auroc", "false positive rate", "true positive rate", 1.0),
    ("pixel_pr", "Pixel precision–recall", "pixel_ap", "recall", "precision", 1.0),
    ("pixel_pro", "Region overlap (PRO)", "aupro", "false positive rate", "mean region overlap", FPR_LIMIT),
)
MAP_BYTES = 3_500
Curves = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]


class Threshold(NamedTuple):
    """Scores from `score` on are alarms, map values from `pixel` on regions; `source` tells their origin."""

    score: float
    pixel: float | None
    source: str
    on_test_set: bool = False


def write_report(
    path: str | os.PathLike,
    title: str,
    gallery: Gallery,
    metrics: Mapping[str, Any] | None = None,
    curves: Curves | None = None,
    threshold: Threshold | None = None,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the report, atomically. What is None is left out.

    `metrics` is what metrics.json holds, `curves` has x [K] and y [K] by part and key of CHARTS, `facts` are short
    texts for the head of the page. All texts may hold anything: they are escaped, and the page's policy allows no
    script but its own.
    """
    kept = gallery.by_score()
    kinds = [kind_of(item.entry, threshold) for item in kept]
    errors = ("○ miss", "▲ false alarm")  # where images are judged, they are filters even without any image
    judged = {*errors, "● hit"}.intersection(kinds)
    page = templates().get_template("report.html")
    pieces = page.generate(
        title=title,
        facts=facts or {},
        gallery=gallery,
        threshold=threshold,
        tiles=_tiles(gallery, metrics, threshold),
        charts=_charts(gallery, metrics or {}, curves or {}, threshold),
        columns={"fusion": metrics, **metrics.get("branches", {})} if metrics else {},
        kept=list(zip(kept, kinds, strict=True)),
        filters={**dict.fromkeys(errors if judged else (), 0), **Counter(sorted(kinds, reverse=True))},
        scales=color_scales(kept),
        config=config and json.dumps(config, indent=2, ensure_ascii=False),
    )
    # Bytes of a file name that are no UTF-8 become "?".
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.writelines(pieces)


def templates() -> Environment:
    """Jinja's environment of this folder: it escapes every text that a template does not call safe."""
    import jinja2

    folder = Path(__file__).parent
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), **options)
    environment.filters |= {"part_title": part_title, "digest": _digest, "uri": _uri, "path": _path}
    environment.filters["colored"] = lambda anomaly_map, scale: encode(colorize(anomaly_map, scale), MAP_BYTES)
    environment.globals |= {name: (folder / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    environment.globals |= {"protocols": protocols(), "ramp": np.linspace(0, 1, 256)[None].repeat(8, 0)}
    return environment


def color_scales(kept: list[Kept]) -> dict[str, tuple[float, float]]:
    """The range of each part's colours: the branches, then what they make together."""
    parts = list(kept[0].maps) if kept else []
    return {
        part: color_scale(np.concatenate([item.maps[part][::2, ::2].ravel() for item in kept]))
        for part in (*parts[1:], *parts[:1])
    }


def part_title(part: str) -> str:
    """The name of a branch, or of the fusion, for people."""
    words = part.replace("_", " ")
    return TITLES.get(part) or words[:1].upper() + words[1:]


def kind_of(entry: Entry, threshold: Threshold | None) -> str:
    """The kind of the entry, by its own alarm if it has one, else by the threshold."""
    alarm = entry.alarm
    if alarm is None and threshold is not None:
        alarm = entry.score >= threshold.score
    return KINDS[entry.label][2 if alarm is None else int(alarm)]


def alarms_of(gallery: Gallery, threshold: Threshold | None) -> np.ndarray:
    """Of all images of the gallery, 1 with an alarm, 0 without; -1 where there is no threshold."""
    scores, alarms = np.asarray(gallery.scores), np.asarray(gallery.alarms)
    return alarms if threshold is None else np.where(alarms < 0, scores >= threshold.score, alarms)


def _tiles(
    gallery: Gallery, metrics: Mapping[str, Any] | None, threshold: Threshold | None
) -> Iterator[tuple[str, str, str, str]]:
    """Title, number, unit and note of the tiles at the top: the main figures, then what the threshold does."""
    for key in HEADLINES if metrics else ():
        value = "–" if metrics[key] is None else f"{metrics[key]:.3f}"
        branches = [(figures[key], part) for part, figures in metrics.get("branches", {}).items()]
        best = max((pair for pair in branches if pair[0] is not None), default=None)
        note = f"best branch {best[0]:.3f}, {part_title(best[1])}" if best else ""
        yield protocols()[key].partition(", ")[0], value, "", note
    scores, labels, alarms = np.asarray(gallery.scores), np.asarray(gallery.labels), alarms_of(gallery, threshold)
    for label, name in ((1, "anomalies found"), (0, "false alarms"), (-1, "alarms")):
        own = alarms[labels == label]
        if (own >= 0).any():
            count = int((own == 1).sum())
            missed = f", {own.size - count} missed" if label == 1 else ""
            yield name, str(count), f" of {own.size}", f"{count / own.size:.1%}{missed}"
    if not metrics and len(gallery):
        yield "highest score", f"{scores.max():.4g}", "", f"of {scores.size} images"
        yield "median score", f"{np.median(scores):.4g}", "", ""


def _charts(
    gallery: Gallery, metrics: Mapping[str, Any], curves: Curves, threshold: Threshold | None
) -> Iterator[tuple[str, str, str, str]]:
    """Title, unit, description and picture of every chart."""
    for key, title, figure, x_title, y_title, x_limit in CHARTS:
        lines = {}
        for part, own in curves.items():
            value = metrics.get("branches", {}).get(part, metrics).get(figure)
            if key in own:
                lines[part_title(part) + ("" if value is None else f" {value:.3f}")] = own[key]
        if lines:
            chance = key.endswith("roc")
            svg = charts.draw(charts.curves, x_title, y_title, lines=lines, x_limit=x_limit, chance=chance)
            yield title, protocols()[figure].partition(", ")[0], ", ".join(lines), _uri(svg, "svg+xml")
    # A single frame needs no histogram, nor the second that importing matplotlib takes.
    if len(gallery) > 1 and importlib.util.find_spec("matplotlib"):  # requirements-edge.txt leaves it out
        groups = {}
        for label, name in ((0, "normal"), (1, "anomalous"), (-1, "unlabelled")):
            own = np.asarray(gallery.scores)[np.asarray(gallery.labels) == label]
            if own.size:
                groups[f"{name} {own.size}"] = own
        level = threshold and threshold.score
        svg = charts.draw(charts.histogram, "image score", "images", groups=groups, threshold=level)
        yield "Image scores", "images", ", ".join(groups), _uri(svg, "svg+xml")


def _path(loops: Loops) -> str:
    """An outline as an SVG path."""
    return "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in loop) + "Z" for loop in loops)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _digest(text: str) -> str:
    """The name of an inline script or style in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
