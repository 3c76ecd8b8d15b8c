"""What a report keeps of a run of any length: the numbers of all images, and the pictures of a limited choice."""

from __future__ import annotations

import dataclasses
import io
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
class Kept:
    """A chosen entry, with its pictures in the size in which the report shows them."""

    entry: Entry
    frame: bytes  # WebP
    size: tuple[int, int]  # of the frame, width and height
    maps: dict[str, np.ndarray]  # float32, of the frame's shape, no side longer than MAP_SIDE
    truth: str  # outline as an SVG path in pixels of the frame; "" without a region

    def contour(self, level: float) -> str:
        """The outline of the main map's pixels from `level` on."""
        return outline(cv2.resize(next(iter(self.maps.values())), self.size) >= level, self.size)


class Gallery:
    """Takes entries one by one; keeps those with the highest scores, and a seeded sample of the rest.

    `expected` is the number of images if it is known; fewer images are kept at a higher resolution. `first` is the
    number of the first entry: galleries of consecutive shares, merged, choose what a single one would. The pictures of
    500 entries take at most about 150 MB, each other entry 10 bytes.
    """

    def __init__(
        self, expected: int | None = None, limit: int = LIMIT, highest: int = HIGHEST, seed: int = 22, first: int = 0
    ) -> None:
        self.limit, self.highest, self.seed, self.first = limit, highest, seed, first
        few = expected is not None and expected <= 200
        self.frame_side, self.frame_bytes = (720, 70_000) if few else (512, 24_000)
        self.scores, self.labels, self.alarms = array("d"), array("b"), array("b")  # -1: None
        self._draws: dict[int, tuple[float, float]] = {}  # score and chance of the entries chosen, by number
        self._kept: dict[int, Kept] = {}

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, entry: Entry, pictures: Callable[[], Pictures]) -> None:
        """Add an entry; `pictures` is called at once, and only if the entry is chosen for now.

        Raises ValueError if a score is not finite.
        """
        if not all(map(math.isfinite, entry.scores.values())):
            raise ValueError(f"a score of {entry.name} is not finite: {entry.scores}")
        number = self.first + len(self)
        self.scores.append(entry.score)
        self.labels.append(-1 if entry.label is None else entry.label)
        self.alarms.append(-1 if entry.alarm is None else entry.alarm)
        self._offer(number, entry.score, lambda: self._shrink(entry, pictures()))

    def by_score(self) -> list[Kept]:
        """The chosen entries, highest score first; ties in order of arrival."""
        return [self._kept[number] for number in self._ranking()]

    def state(self) -> dict[str, np.ndarray]:
        """All numbers and the chosen entries, as plain arrays."""
        state = {"scores": np.array(self.scores), "labels": np.array(self.labels), "alarms": np.array(self.alarms)}
        texts = []
        for number, kept in self._kept.items():
            state[f"{number} frame"] = np.array(bytearray(kept.frame))
            state |= {f"{number} {part}": small for part, small in kept.maps.items()}
            texts.append((number, dataclasses.asdict(kept.entry), kept.size, list(kept.maps), kept.truth))
        return {**state, "texts": np.array(bytearray(json.dumps(texts).encode()))}

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add the entries that follow, given another gallery's `state()`."""
        arrays = {name: np.asarray(values) for name, values in state.items()}
        for own, name in ((self.scores, "scores"), (self.labels, "labels"), (self.alarms, "alarms")):
            own.frombytes(arrays[name].tobytes())
        for number, entry, size, parts, truth in json.loads(arrays["texts"].tobytes()):
            maps = {part: arrays[f"{number} {part}"] for part in parts}
            kept = Kept(Entry(**entry), arrays[f"{number} frame"].tobytes(), tuple(size), maps, truth)
            self._offer(number, kept.entry.score, lambda kept=kept: kept)

    def _offer(self, number: int, score: float, make: Callable[[], Kept]) -> None:
        """Choose the entry; if that is one too many, drop the lowest draw among all but the highest scores."""
        chance = random.Random(f"{self.seed} {number}").random()  # depends on its number alone, not on scores
        self._draws[number] = score, chance
        if len(self._draws) > self.limit:
            loser = min(self._ranking()[self.highest :], key=lambda number: self._draws[number][1])
            del self._draws[loser]
            self._kept.pop(loser, None)
        if number in self._draws:
            self._kept[number] = make()

    def _ranking(self) -> list[int]:
        return sorted(self._draws, key=lambda number: (-self._draws[number][0], number))

    def _shrink(self, entry: Entry, pictures: Pictures) -> Kept:
        size = fitted(pictures.frame.shape[1::-1], self.frame_side)
        frame = cv2.resize(pictures.frame, size, interpolation=cv2.INTER_AREA)
        map_size = fitted(size, MAP_SIDE)
        maps = {part: cv2.resize(full.astype(np.float32), map_size) for part, full in pictures.maps.items()}
        truth = "" if pictures.truth is None else outline(pictures.truth, size)
        return Kept(entry, encode(frame, self.frame_bytes), size, maps, truth)


def fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size (w, h) of a picture that is made as small as `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


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
