"""report.html: figures, curves, histogram and pictures in one file that asks for nothing beside itself."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np

from metrics import protocols
from metrics.pixel import FPR_LIMIT
from reporting.cards import Threshold, card, filters, group_options, html_text, kind_of, legend, part_title
from reporting.charts import Bars, Line, curve_chart, histogram_chart
from reporting.gallery import Gallery, Kept
from reporting.visualize import color_scale
from utils.files import atomic_write

HEADLINES = ("image_auroc", "pixel_auroc", "aupro")
Curves = Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]


class Chart(NamedTuple):
    """A curve: key in `Curves`, title, figure of metrics.json that sums it up, axes."""

    key: str
    title: str
    figure: str
    x: str
    y: str
    x_limit: float = 1.0


CHARTS = (
    Chart("image_roc", "Image ROC", "image_auroc", "false positive rate", "true positive rate"),
    Chart("image_pr", "Image precision–recall", "image_ap", "recall", "precision"),
    Chart("pixel_roc", "Pixel ROC", "pixel_auroc", "false positive rate", "true positive rate"),
    Chart("pixel_pr", "Pixel precision–recall", "pixel_ap", "recall", "precision"),
    Chart("pixel_pro", "Region overlap (PRO)", "aupro", "false positive rate", "mean region overlap", FPR_LIMIT),
)


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

    `metrics` is what metrics.json holds, `curves` has x and y by part and `Chart.key`, `facts` are short
    texts for the head of the page. All texts may hold anything: they are escaped, and the page's policy
    allows no script but its own.
    """
    style, script, page = (
        Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    kept = gallery.by_score()
    parts = list(kept[0].maps) if kept else []
    scales = {
        part: color_scale(
            np.concatenate([item.maps[part].values()[::2, ::2].ravel() for item in kept if part in item.maps])
        )
        for part in parts
    }
    shown_kinds = [kind_of(item.entry, threshold) for item in kept]
    fields = {
        "title": html_text(title),
        "policy": f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "facts": _facts(facts or {}),
        "verdict": _verdict(gallery, metrics, threshold),
        "figures": _figures(metrics) if metrics else "",
        "charts": _charts(gallery, metrics, curves or {}, threshold),
        "filters": filters(shown_kinds),
        "groups": group_options([item.entry.group for item in kept]),
        "choice": _choice(gallery, kept),
        "legend": legend(scales, kept, threshold),
        "config": "" if config is None else _config(config),
    }
    head, tail = page.split("$cards")
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(Template(head).substitute(fields))
        for number, (item, kind) in enumerate(zip(kept, shown_kinds, strict=True), 1):
            file.write("".join(card(number, item, kind, scales, threshold)))
        file.write(Template(tail).substitute(fields))


def _verdict(gallery: Gallery, metrics: Mapping[str, Any] | None, threshold: Threshold | None) -> str:
    """The tiles at the top: the main figures, then what the threshold does."""
    tiles = []
    for key in HEADLINES if metrics else ():
        name = protocols()[key].partition(", ")[0]
        branches = [(figures[key], part) for part, figures in metrics.get("branches", {}).items()]
        best = max((pair for pair in branches if pair[0] is not None), default=None)
        note = f"best branch {best[0]:.3f}, {html_text(part_title(best[1]))}" if best else ""
        tiles.append(_tile(name[0].upper() + name[1:], _figure(metrics[key], 3), note, "main"))
    scores, labels, alarms = (np.asarray(numbers) for numbers in (gallery.scores, gallery.labels, gallery.alarms))
    if threshold is not None:
        alarms = np.where(alarms < 0, scores >= threshold.score, alarms)
    if (alarms >= 0).any():
        bad, good = labels == 1, labels == 0
        if bad.any():
            tiles.append(_count_tile("Anomalies found", int((alarms[bad] == 1).sum()), int(bad.sum()), "missed"))
        if good.any():
            tiles.append(_count_tile("False alarms", int((alarms[good] == 1).sum()), int(good.sum())))
        if (labels < 0).any():
            tiles.append(_count_tile("Alarms", int((alarms == 1).sum()), len(gallery)))
    if not metrics and len(gallery):
        tiles.append(_tile("Highest score", f"{scores.max():.4g}", f"of {len(gallery)} images"))
        tiles.append(_tile("Median score", f"{np.median(scores):.4g}", ""))
    note = ""
    if threshold is not None:
        warning = " It was chosen on the test set, for orientation only." if threshold.on_test_set else ""
        pixel = "" if threshold.pixel is None else f", per pixel {threshold.pixel:.4g}"
        note = (
            f'<p class="note{" warning" if threshold.on_test_set else ""}"><b>Threshold {threshold.score:.4g}'
            f"</b>{pixel}: {html_text(threshold.source)}.{warning}</p>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>{note}'


def _count_tile(title: str, count: int, total: int, rest: str = "") -> str:
    note = f"{count / total:.1%}" + (f", {total - count} {rest}" if rest else "")
    return _tile(title, f"{count}<small> of {total}</small>", note)


def _tile(title: str, value: str, note: str, style: str = "") -> str:
    return f'<div class="tile {style}"><h2>{title}</h2><p class="value">{value}</p><p>{note}</p></div>'


def _figures(metrics: Mapping[str, Any]) -> str:
    """Every figure with its protocol, branches beside the fusion."""
    columns = {"fusion": metrics, **metrics.get("branches", {})}
    head = "".join(f'<th scope="col">{html_text(part_title(part))}</th>' for part in columns)
    rows = []
    for key, protocol in protocols().items():
        name, _, detail = protocol.partition(", ")
        cells = "".join(f"<td>{_figure(figures[key], 4)}</td>" for figures in columns.values())
        detail = f"<small>{html_text(detail)}</small>" if detail else ""
        rows.append(f'<tr data-key="{key}"><th scope="row">{html_text(name)}{detail}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="All figures"><table class="figures">'
        f'<thead><tr><th scope="col">Figure and protocol</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _figure(value: float | None, digits: int) -> str:
    if value is None:
        return '<span title="undefined on these images">–</span>'
    return f'<data value="{value!r}">{value:.{digits}f}</data>'


def _charts(gallery: Gallery, metrics: Mapping[str, Any] | None, curves: Curves, threshold: Threshold | None) -> str:
    figures = []
    by_part = {**(metrics or {}).get("branches", {})}
    for chart in CHARTS:
        drawn = {part: own[chart.key] for part, own in curves.items() if chart.key in own}
        if not drawn:
            continue
        lines, keys = [], []
        for index, (part, (x, y)) in enumerate(drawn.items()):
            value = by_part.get(part, metrics or {}).get(chart.figure)
            keys.append((f"s{index}", part_title(part), "" if value is None else f"{value:.3f}"))
            lines.append(Line(part_title(part), f"s{index}", x, y))
        summary = ", ".join(f"{name} {value}" for _, name, value in keys)
        svg = curve_chart(
            f"{chart.title}; {summary}",
            chart.x,
            chart.y,
            lines,
            chart.x_limit,
            chance=chart.key.endswith("roc"),
        )
        name = protocols()[chart.figure].partition(", ")[0]
        figures.append(_chart_figure(chart.title, name, svg, keys))
    if len(gallery):
        figures.append(_histogram(gallery, threshold))
    return f'<div class="charts">{"".join(figures)}</div>'


def _histogram(gallery: Gallery, threshold: Threshold | None) -> str:
    scores, labels = np.asarray(gallery.scores), np.asarray(gallery.labels)
    names = {0: "normal", 1: "anomalous", -1: "not labelled"}
    groups = [
        Bars(name, name.split()[0], scores[labels == label]) for label, name in names.items() if (labels == label).any()
    ]
    counts = [(group.style, group.name, str(group.values.size)) for group in groups]
    label = "Histogram of image scores; " + ", ".join(f"{count} {name}" for _, name, count in counts)
    svg = histogram_chart(label, "image score", groups, None if threshold is None else threshold.score)
    return _chart_figure("Image scores", "images", svg, counts)


def _chart_figure(title: str, unit: str, svg: str, entries: list[tuple[str, str, str]]) -> str:
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line {style}" d="M0 4H22"/>'
        f"</svg>{html_text(name)} <b>{value}</b></li>"
        for style, name, value in entries
    )
    return (
        f'<figure class="chart-box"><figcaption><h2>{title}</h2><span>{html_text(unit)}</span></figcaption>'
        f'{svg}<ul class="keys">{keys}</ul></figure>'
    )


def _choice(gallery: Gallery, kept: list[Kept]) -> str:
    if len(kept) == len(gallery):
        return "Highest score first."
    highest = min(gallery.highest, len(kept))
    return (
        f"Highest score first: the {highest} highest scores and {len(kept) - highest} of the other "
        f"{len(gallery) - highest} images, drawn at random with seed {gallery.seed}. Figures, curves and "
        f"histogram cover all {len(gallery)} images."
    )


def _facts(facts: Mapping[str, str]) -> str:
    return "".join(
        f"<div><dt>{html_text(key)}</dt><dd>{html_text(str(value))}</dd></div>" for key, value in facts.items()
    )


def _config(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return f"<details><summary>Configuration</summary><pre>{html_text(text)}</pre></details>"


def _digest(text: str) -> str:
    """What a content security policy calls an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
