"""What a report keeps of a run of any length: the numbers of all images, the pictures of a bounded choice."""

from __future__ import annotations

import dataclasses
import heapq
import io
import itertools
import json
import math
import random
from array import array
from collections.abc import Callable, Mapping

import cv2
import numpy as np
from PIL import Image

LIMIT = 500  # entries with pictures
HIGHEST = 200  # of these, the ones with the highest scores; the others are a sample of the rest
MAP_SIDE = 128
MAIN_MAP_SIDE = 192  # the main part's map also gives the contour
MAX_BORDERS, MAX_PATH = 40, 4000
QUALITIES = (80, 60, 40, 20)  # of WebP; the first whose bytes fit is taken


@dataclasses.dataclass(frozen=True)
class Entry:
    """An image or frame. Texts may hold anything; `scores` are finite, by part, the main part first."""

    name: str
    scores: dict[str, float]
    label: int | None = None  # 1 anomalous, 0 normal, None unknown
    group: str = ""  # defect folder or source
    alarm: bool | None = None  # None: decided by the report's threshold
    note: str = ""

    @property
    def score(self) -> float:
        return next(iter(self.scores.values()))


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Frame [H, W, 3] (uint8 RGB), maps [S, S] by part, stretched to the frame, true region (bool)."""

    frame: np.ndarray
    maps: dict[str, np.ndarray]
    truth: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class SmallMap:
    """A map at no more than a report's resolution: 16-bit levels between `low` and `high`."""

    levels: np.ndarray
    low: float
    high: float

    @classmethod
    def pack(cls, anomaly_map: np.ndarray, side: int) -> SmallMap:
        size = tuple(min(length, side) for length in anomaly_map.shape[::-1])
        small = cv2.resize(anomaly_map.astype(np.float32), size, interpolation=cv2.INTER_AREA).astype(float)
        low, high = float(small.min()), float(small.max())
        levels = (small - low) / ((high - low) or 1.0) * 65535
        return cls(levels.round().astype(np.uint16), low, high)

    def values(self) -> np.ndarray:
        """The map [h, w], float32."""
        return (self.low + self.levels * ((self.high - self.low) / 65535)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Kept:
    """An entry of the choice, with its pictures as small as the report shows them."""

    entry: Entry
    frame: bytes  # WebP
    size: tuple[int, int]  # of the frame, width and height
    maps: dict[str, SmallMap]
    truth: str  # outline as an SVG path in pixels of the frame; "" without a region


class Gallery:
    """Takes entries one by one; keeps the 200 highest scores, and of the rest a sample that the seed decides.

    `expected` is the number of images where it is known: few of them are kept at a higher resolution. `first` is the
    number of the first entry, where another gallery has those before it: merged, they choose what one would have.
    Memory stays bounded (about 100 MB for 500 entries), but for 10 bytes an entry.
    """

    def __init__(
        self,
        expected: int | None = None,
        limit: int = LIMIT,
        highest: int = HIGHEST,
        seed: int = 22,
        first: int = 0,
    ) -> None:
        self.limit, self.highest, self.seed, self.first = limit, highest, seed, first
        few = expected is not None and expected <= 200
        self.frame_side, self.frame_bytes = (720, 70_000) if few else (512, 24_000)
        self.scores, self.labels, self.alarms = array("d"), array("b"), array("b")  # -1: None
        self._top: list[tuple[float, int, Kept]] = []  # heap of score, -number, entry
        self._sample: list[tuple[float, int, Kept]] = []  # heap of chance, number, entry

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, entry: Entry, pictures: Callable[[], Pictures]) -> None:
        """Take in an entry; `pictures` is called, at once, only if the entry belongs to the choice so far.

        Raises ValueError if a score is not finite.
        """
        if not all(map(math.isfinite, entry.scores.values())):
            raise ValueError(f"a score of {entry.name} is not finite: {entry.scores}")
        number = self.first + len(self)
        self.scores.append(entry.score)
        self.labels.append(-1 if entry.label is None else entry.label)
        self.alarms.append(-1 if entry.alarm is None else entry.alarm)
        in_top = len(self._top) < self.highest or (entry.score, -number) > self._top[0][:2]
        if in_top or len(self._sample) < self.limit - self.highest or self._chance(number) > self._sample[0][0]:
            self._keep(number, self._shrink(entry, pictures()))

    def by_score(self) -> list[Kept]:
        """The choice, highest score first; ties in order of arrival."""
        chosen = sorted(self._chosen().items(), key=lambda item: (-item[1].entry.score, item[0]))
        return [kept for _, kept in chosen]

    def state(self) -> dict[str, np.ndarray]:
        """All numbers, and the choice, as plain arrays."""
        state = {"scores": np.array(self.scores), "labels": np.array(self.labels), "alarms": np.array(self.alarms)}
        texts = []
        for number, kept in self._chosen().items():
            state[f"{number} frame"] = np.array(bytearray(kept.frame))
            state |= {f"{number} {part}": small.levels for part, small in kept.maps.items()}
            ranges = {part: (small.low, small.high) for part, small in kept.maps.items()}
            texts.append((number, dataclasses.asdict(kept.entry), kept.size, ranges, kept.truth))
        return {**state, "texts": np.array(bytearray(json.dumps(texts).encode()))}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the entries that follow, given another gallery's `state()`."""
        arrays = {name: np.asarray(values) for name, values in state.items()}
        for own, name in ((self.scores, "scores"), (self.labels, "labels"), (self.alarms, "alarms")):
            own.frombytes(arrays[name].tobytes())
        for number, entry, size, ranges, truth in json.loads(arrays["texts"].tobytes()):
            maps = {part: SmallMap(arrays[f"{number} {part}"], *limits) for part, limits in ranges.items()}
            kept = Kept(Entry(**entry), arrays[f"{number} frame"].tobytes(), tuple(size), maps, truth)
            self._keep(number, kept)

    def _chosen(self) -> dict[int, Kept]:
        return {-number: kept for _, number, kept in self._top} | {number: kept for _, number, kept in self._sample}

    def _chance(self, number: int) -> float:
        """An entry's place in the draw: its number's alone, and so independent of all scores."""
        return random.Random(f"{self.seed} {number}").random()

    def _keep(self, number: int, kept: Kept) -> None:
        """Put an entry among the highest; the one that it drives out, or itself, takes part in the draw."""
        heapq.heappush(self._top, (kept.entry.score, -number, kept))
        if len(self._top) <= self.highest:
            return
        _, number, kept = heapq.heappop(self._top)
        heapq.heappush(self._sample, (self._chance(-number), -number, kept))
        if len(self._sample) > self.limit - self.highest:
            heapq.heappop(self._sample)

    def _shrink(self, entry: Entry, pictures: Pictures) -> Kept:
        height, width = pictures.frame.shape[:2]
        scale = min(1.0, self.frame_side / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        frame = cv2.resize(pictures.frame, size, interpolation=cv2.INTER_AREA)
        sides = itertools.chain([MAIN_MAP_SIDE], itertools.repeat(MAP_SIDE))
        maps = {
            name: SmallMap.pack(part, side) for (name, part), side in zip(pictures.maps.items(), sides, strict=False)
        }
        truth = "" if pictures.truth is None else outline(pictures.truth, size)
        return Kept(entry, encode(frame, self.frame_bytes), size, maps, truth)


def encode(image: np.ndarray, budget: int) -> bytes:
    """RGB uint8 [H, W, 3] as WebP of at most `budget` bytes, at lower quality and resolution if need be."""
    while True:
        for quality in QUALITIES:
            data = io.BytesIO()
            # Method 1 takes a third of the time of the default, 4, for a tenth more bytes.
            Image.fromarray(image).save(data, "WEBP", quality=quality, method=1)
            if data.tell() <= budget or max(image.shape[:2]) < 16:
                return data.getvalue()
        image = cv2.resize(image, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)


def outline(region: np.ndarray, size: tuple[int, int]) -> str:
    """The borders of a bool region [H, W], holes included, as an SVG path in a frame of `size` (w, h).

    The longest borders are drawn, and as exactly as MAX_PATH characters allow.
    """
    borders, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scale = np.array([size[0] / region.shape[1], size[1] / region.shape[0]])
    longest = sorted(borders, key=len, reverse=True)[:MAX_BORDERS]
    scaled = [((border + 0.5) * scale).astype(np.float32) for border in longest]
    tolerance = 0.6  # pixels of the frame
    while True:
        loops = [cv2.approxPolyDP(border, tolerance, True)[:, 0] for border in scaled]
        path = "".join("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in loop) + "Z" for loop in loops)
        if len(path) <= MAX_PATH:
            return path
        tolerance *= 2
