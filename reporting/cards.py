"""The report's gallery: one card an image, what became of it, and the filters over the cards."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

import cv2
import numpy as np

from reporting.gallery import MAP_SIDE, Entry, Kept, encode, outline
from reporting.visualize import colorize

TITLES = {"fusion": "Fused", "ma_clu": "MACLU", "ma2patch": "MA2Patch", "pc": "PatchCore"}
COLORS = cv2.COLORMAP_INFERNO  # even in lightness, so that it reads without colour vision and in print
MAP_BYTES = 3_500


class Threshold(NamedTuple):
    """Scores from `score` on are alarms, map values from `pixel` on regions; `source` tells their origin."""

    score: float
    pixel: float | None
    source: str
    on_test_set: bool = False


class Kind(NamedTuple):
    """What became of an entry: key in the page's address, singular, plural, mark."""

    key: str
    one: str
    many: str
    mark: str


# By label (1 anomalous, 0 normal, None unknown) and alarm (None: no threshold); in the order of the filters.
KINDS = {
    (0, True): Kind("false-alarms", "false alarm", "False alarms", "▲"),
    (1, False): Kind("misses", "miss", "Misses", "○"),
    (1, True): Kind("hits", "hit", "Hits", "●"),
    (0, False): Kind("normal", "normal", "Normal", "–"),
    (1, None): Kind("anomalous", "anomalous", "Anomalous", "●"),
    (0, None): Kind("normal", "normal", "Normal", "–"),
    (None, True): Kind("alarms", "alarm", "Alarms", "▲"),
    (None, False): Kind("quiet", "no alarm", "No alarm", "–"),
    (None, None): Kind("unrated", "not rated", "Not rated", "–"),
}


def filters(kinds: list[Kind]) -> str:
    """A button for every kind that there is; of judged images false alarms and misses also where there are none."""
    buttons = [("", "All", len(kinds))]
    judged = {"false-alarms", "misses", "hits"} & {kind.key for kind in kinds}
    for kind in dict.fromkeys(KINDS.values()):
        count = kinds.count(kind)
        if count or (kind.key in ("false-alarms", "misses") and judged):
            buttons.append((kind.key, kind.many, count))
    return "".join(
        f'<button type="button" data-filter="{key}" aria-pressed="{"false" if key else "true"}">{name} '
        f"<b>{count}</b></button>"
        for key, name, count in buttons
    )


def group_options(groups: list[str]) -> str:
    """The choices of the folder filter."""
    return "".join(
        f'<option value="{html_text(group)}">{html_text(group)} ({groups.count(group)})</option>'
        for group in sorted(set(groups))
        if group
    )


def legend(scales: dict[str, tuple[float, float]], kept: list[Kept], threshold: Threshold | None) -> str:
    """What colours and contours stand for."""
    items = []
    if threshold is not None and threshold.pixel is not None:
        items.append('<li><span class="swatch found"></span>Contour of the fused map at its threshold</li>')
    if any(item.truth for item in kept):
        items.append('<li><span class="swatch truth"></span>Ground truth</li>')
    if scales:
        ramp = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None].repeat(8, 0), COLORS)
        ranges = "".join(
            f"<span><b>{html_text(part_title(part))}</b> {low:.3g} to {high:.3g}</span>"
            for part, (low, high) in scales.items()
        )
        items.append(
            f'<li class="ramp"><img alt="From low to high" width="128" height="8" '
            f'src="{_data_uri(encode(ramp[..., ::-1], MAP_BYTES))}">'
            f"Same colours in all images: {ranges}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""


def card(
    number: int,
    item: Kept,
    kind: Kind,
    scales: dict[str, tuple[float, float]],
    threshold: Threshold | None,
) -> Iterator[str]:
    """The pieces of an image's card: frame with contours, true region, maps by `scales`, name and score."""
    entry, (width, height) = item.entry, item.size
    box = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none"'
    size = f'width="{width}" height="{height}"'
    shrink = min(1.0, MAP_SIDE / max(item.size))
    map_size = max(1, round(width * shrink)), max(1, round(height * shrink))
    lazy = f'<img alt="" {size} loading="lazy" decoding="async" src'
    found = ""
    if threshold is not None and threshold.pixel is not None and item.maps:
        main = next(iter(item.maps.values())).values()
        main = cv2.resize(main, item.size, interpolation=cv2.INTER_LINEAR)
        found = outline(main >= threshold.pixel, item.size)
    name, group = html_text(entry.name), html_text(entry.group)
    yield (
        f'<article class="card" id="image-{number}" data-kind="{kind.key}" data-group="{group}" '
        f'data-name="{name}"><button type="button" class="open" aria-label="Enlarge {name}, {kind.one}">'
        f'<span class="frame">{lazy}="{_data_uri(item.frame)}">'
        f'<svg class="outlines" {box} aria-hidden="true"><g class="truth"><path id="truth-{number}" '
        f'd="{item.truth}"/></g><g class="found"><path d="{found}"/></g></svg></span><span class="panels">'
    )
    if entry.label is not None:
        yield (
            f'<span class="panel"><svg class="region" {box} {size} aria-hidden="true">'
            f'<use href="#truth-{number}"/></svg><span>Truth</span></span>'
        )
    ordered = itertools.chain(list(item.maps.items())[1:], list(item.maps.items())[:1])
    for part, small in ordered:  # branches, then what they make together
        values = cv2.resize(small.values(), map_size, interpolation=cv2.INTER_LINEAR)
        data = _data_uri(encode(colorize(values, scales[part], COLORS)[..., ::-1], MAP_BYTES))
        score = f' data-score="{entry.scores[part]:.5g}"' if part in entry.scores else ""
        yield (f'<span class="panel"{score}>{lazy}="{data}"><span>{html_text(part_title(part))}</span></span>')
    note = f" <small>{html_text(entry.note)}</small>" if entry.note else ""
    yield (
        f'</span></button><h3><bdi>{name}</bdi>{note}</h3><p><span class="kind {kind.key}">'
        f'<i aria-hidden="true">{kind.mark}</i>{kind.one}</span>'
        f'<span class="score">{entry.score:.4g}</span></p></article>\n'
    )


def kind_of(entry: Entry, threshold: Threshold | None) -> Kind:
    """What became of the entry: its own alarm if it has one, else by the threshold."""
    alarm = entry.alarm
    if alarm is None and threshold is not None:
        alarm = entry.score >= threshold.score
    return KINDS[entry.label, alarm]


def part_title(part: str) -> str:
    """The name of a branch, or of the fusion, for people."""
    return TITLES.get(part, part)


def html_text(text: str) -> str:
    """Any text, escaped for HTML content and attributes; bytes of a file name that are no UTF-8 become ?."""
    return escape(text.encode("utf-8", "replace").decode("utf-8"))


def _data_uri(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")
