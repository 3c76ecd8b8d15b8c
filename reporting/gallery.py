"""What a report keeps of a run of any length: the numbers of all images, and the pictures of a limited choice."""

import dataclasses
import json
import random
from array import array
from collections.abc import Callable, Mapping

import cv2
import numpy as np

from reporting.pictures import encode, fitted, outline

LIMIT = 500  # entries with pictures
EXTREME = 100  # of these, the highest scores of images not known to be anomalous, and as many lowest of anomalous ones
MAP_SIDE = 128
Loops = list[list[list[float]]]  # an outline


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
    truth: Loops  # outline in pixels of the frame; empty without a region

    def contour(self, level: float) -> Loops:
        """The outline of the main map's pixels from `level` on."""
        return outline(cv2.resize(next(iter(self.maps.values())), self.size) >= level, self.size)


class Gallery:
    """Takes entries one by one; keeps the EXTREME ones, which may be mistaken, and a seeded sample of the rest.

    `expected` is the number of images if it is known; fewer images are kept at a higher resolution. `first` is the
    number of the first entry: galleries of consecutive shares, merged, choose what a single one would. The pictures of
    500 entries take at most about 150 MB, each other entry 10 bytes.
    """

    def __init__(
        self, expected: int | None = None, limit: int = LIMIT, extreme: int = EXTREME, seed: int = 22, first: int = 0
    ) -> None:
        self.limit, self.extreme, self.seed, self.first = limit, extreme, seed, first
        few = expected is not None and expected <= 200
        self.frame_side, self.frame_bytes = (720, 70_000) if few else (512, 24_000)
        self.scores, self.labels, self.alarms = array("d"), array("b"), array("b")  # -1: None
        self._chances: dict[int, float] = {}  # of the entries chosen, by number
        self._kept: dict[int, Kept] = {}

    def __len__(self) -> int:
        return len(self.scores)

    def add(self, entry: Entry, pictures: Callable[[], Pictures]) -> None:
        """Add an entry; `pictures` is called at once, and only if the entry is chosen for now."""
        number = self.first + len(self)
        self.scores.append(entry.score)
        self.labels.append(-1 if entry.label is None else entry.label)
        self.alarms.append(-1 if entry.alarm is None else entry.alarm)
        self._offer(number, lambda: self._shrink(entry, pictures()))

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
            self._offer(number, lambda kept=kept: kept)

    def _offer(self, number: int, make: Callable[[], Kept]) -> None:
        """Choose the entry; if that is one too many, drop the lowest chance among all but the extreme ones."""
        # The chance depends on the number alone, not on scores.
        self._chances[number] = random.Random(f"{self.seed} {number}").random()
        if len(self._chances) > self.limit:
            ranking = self._ranking()
            anomalous = [other for other in ranking if self.labels[other - self.first] == 1]
            others = [other for other in ranking if self.labels[other - self.first] != 1]
            loser = min(anomalous[: -self.extreme] + others[self.extreme :], key=self._chances.__getitem__)
            del self._chances[loser]
            self._kept.pop(loser, None)
        if number in self._chances:
            self._kept[number] = make()

    def _ranking(self) -> list[int]:
        return sorted(self._chances, key=lambda number: (-self.scores[number - self.first], number))

    def _shrink(self, entry: Entry, pictures: Pictures) -> Kept:
        size = fitted(pictures.frame.shape[1::-1], self.frame_side)
        frame = cv2.resize(pictures.frame, size, interpolation=cv2.INTER_AREA)
        map_size = fitted(size, MAP_SIDE)
        maps = {part: cv2.resize(full.astype(np.float32), map_size) for part, full in pictures.maps.items()}
        truth = [] if pictures.truth is None else outline(pictures.truth, size)
        return Kept(entry, encode(frame, self.frame_bytes), size, maps, truth)
