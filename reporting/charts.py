"""Curves and histograms as inline SVG; colours and line styles come from the page's style sheet, by class."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 380, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 366, 14, 238


class Line(NamedTuple):
    """A curve [K], x rising; `name` is also what the pointer shows, `style` a class of the style sheet."""

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray


class Bars(NamedTuple):
    """One population of a histogram."""

    name: str
    style: str
    values: np.ndarray


def curve_chart(
    label: str, x_title: str, y_title: str, lines: Sequence[Line], x_limit: float = 1.0, chance: bool = False
) -> str:
    """Curves over x from 0 to `x_limit`, y from 0 to 1; `chance` adds the diagonal of a random ranking."""
    parts = [_frame(label, x_title, y_title, f'data-x-limit="{x_limit:g}" data-x="{x_title}" data-y="{y_title}"')]
    parts += [_x_tick(_x(t / x_limit), f"{t:g}") for t in ticks(0, x_limit, 5)]
    parts += [_y_tick(t, f"{t:g}") for t in ticks(0, 1, 5)]
    if chance:
        parts.append(f'<line class="chance" x1="{LEFT}" y1="{BOTTOM}" x2="{RIGHT}" y2="{_y(x_limit):.1f}"/>')
    for line in reversed(lines):  # the first one on top
        points = _visible(np.asarray(line.x), np.asarray(line.y), x_limit)
        text = " ".join(f"{_x(x / x_limit):.2f},{_y(y):.2f}" for x, y in points)
        parts.append(f'<polyline class="line {line.style}" data-name="{escape(line.name)}" points="{text}"/>')
    return "".join(parts) + '<g class="cursor" hidden><circle r="4"/></g></svg>'


def histogram_chart(label: str, x_title: str, groups: Sequence[Bars], threshold: float | None) -> str:
    """Counts of each group's values in common bins, the threshold as a line; a log axis for long tails."""
    values = np.concatenate([group.values for group in groups])
    everything = values if threshold is None else np.append(values, threshold)
    low, high = float(everything.min()), float(everything.max())
    log = low > 0 and high > 30 * float(np.median(values))
    position = np.log10 if log else np.asarray
    start, end = (float(position(edge)) for edge in (low, high))
    margin = 0.02 * (end - start) or 0.5
    edges = np.linspace(start - margin, end + margin, int(np.clip(2 * math.sqrt(values.size), 10, 40)) + 1)

    def x_of(value: float) -> float:
        return _x((value - edges[0]) / (edges[-1] - edges[0]))

    counts = [np.histogram(position(group.values), edges)[0] for group in groups]
    top = max(1, *(int(count.max()) for count in counts)) * 1.12  # room for the threshold's label
    parts = [_frame(label, x_title + (" (log scale)" if log else ""), "images")]
    if log:
        decades = range(math.ceil(edges[0]), math.floor(edges[-1]) + 1)
        stride = max(1, len(decades) // 6)
        parts += [_x_tick(x_of(decade), f"{10.0**decade:g}") for decade in decades[::stride]]
    else:
        parts += [_x_tick(x_of(t), f"{t:.6g}") for t in ticks(edges[0], edges[-1], 5)]
    parts += [_y_tick(t / top, f"{t:g}") for t in ticks(0, top, 4) if t == int(t)]
    for group, count in zip(groups, counts, strict=True):
        steps = "".join(f"V{_y(n / top):.1f}H{x_of(right):.1f}" for n, right in zip(count, edges[1:], strict=True))
        parts.append(f'<path class="bars {group.style}" d="M{LEFT} {BOTTOM}{steps}V{BOTTOM}Z"/>')
    for i, (left, right) in enumerate(itertools.pairwise(edges)):
        if any(count[i] for count in counts):
            span = " to ".join(f"{10**edge if log else edge:.4g}" for edge in (left, right))
            shares = ", ".join(f"{count[i]} {g.name}" for g, count in zip(groups, counts, strict=True))
            parts.append(
                f'<rect class="bin" x="{x_of(left):.1f}" y="{TOP}" width="{x_of(right) - x_of(left):.1f}" '
                f'height="{BOTTOM - TOP}"><title>{span}: {escape(shares)}</title></rect>'
            )
    if threshold is not None:
        x = x_of(float(position(threshold)))
        side = ("end", -5) if x > (LEFT + RIGHT) / 2 else ("start", 5)
        parts.append(f'<line class="threshold" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{BOTTOM}"/>')
        parts.append(
            f'<text class="threshold-label" x="{x + side[1]:.1f}" y="{TOP + 9}" text-anchor="{side[0]}">'
            f"threshold {threshold:.4g}</text>"
        )
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, about: int) -> list[float]:
    """About that many round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda size: abs(size - raw))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _visible(x: np.ndarray, y: np.ndarray, limit: float) -> np.ndarray:
    """The points [K, 2] up to `limit`, where y is interpolated; no more than one a tenth of a pixel."""
    if x[-1] > limit:
        end = int(np.searchsorted(x, limit, side="right"))
        x, y = np.append(x[:end], limit), np.append(y[:end], np.interp(limit, x, y))
    points = np.stack([x, y], axis=1)
    cells = (points * [3000 / limit, 3000]).astype(np.int64)
    kept = np.any(np.diff(cells, axis=0, prepend=cells[:1] - 1) != 0, axis=1)
    kept[-1] = True
    return points[kept]


def _frame(label: str, x_title: str, y_title: str, data: str = "") -> str:
    middle_x, middle_y = (LEFT + RIGHT) // 2, (TOP + BOTTOM) // 2
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" {data}>'
        f'<rect class="plot" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"/>'
        f'<text class="axis" x="{middle_x}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="axis" transform="translate(12 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_title)}</text>"
    )


def _x_tick(x: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{BOTTOM}"/>'
        f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 15}" text-anchor="middle">{text}</text>'
    )


def _y_tick(share: float, text: str) -> str:
    y = _y(share)
    return (
        f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>'
    )


def _x(share: float) -> float:
    return LEFT + (RIGHT - LEFT) * share


def _y(share: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * share
