"""A camera that needs no watching: it gives its newest frame, and connects again when a connection fails."""

import itertools
import time
from collections.abc import Iterator

import cv2
import numpy as np

from datasets.connection import ANSWER_SECONDS, Connection, Shot, utc_now
from datasets.frames import FROZEN, GREY, LOST, OK, RESIZED, SILENT, UNREADABLE, Frame
from datasets.images import PLAIN, Decoding, levels
from utils.command_line import warn
from utils.errors import InputError
from utils.safe_text import redact

FREEZE_SECONDS = 10.0
SHORTEST_PAUSE, LONGEST_PAUSE, GROWTH = 0.5, 30.0, 1.5  # seconds between attempts to connect
STEADY = 1.0  # seconds of pictures after which pauses begin anew with the shortest
MOST_HUNG = 4  # threads inside OpenCV that never came back; no more are started


class CameraLost(OSError):
    """The camera has given no picture for too long."""


class Camera:
    """A camera's number, or the address of a stream.

    `freeze`: seconds with nothing new after which it connects again. `give_up`: seconds without a picture after which
    `frames` raises CameraLost; None: never.
    """

    paths = problems = ()

    def __init__(self, address: str, freeze: float | None = None, give_up: float | None = None) -> None:
        self.address = address
        self.name = f"camera {address}" if address.isdigit() else redact(address)
        self.freeze = FREEZE_SECONDS if freeze is None else freeze
        self.give_up = give_up
        self._every = 1
        self._numbers = itertools.count()
        self._connection: Connection | None = None
        self._left: list[Connection] = []  # left behind, perhaps hung
        self._pause = SHORTEST_PAUSE
        self._down: str | None = None  # the status of the outage, if there is one
        self._up_since = self._good = 0.0  # time.monotonic() of the end of the last outage, and of the last frame
        self._size: tuple[int, ...] | None = None
        self._had_color = self._is_grey = self._is_garbled = False

    @property
    def dropped(self) -> int:
        """Frames that came faster than they were taken."""
        return self._connection.dropped if self._connection else 0

    def open(self, every: int) -> None:
        """Connect; raises InputError unless a picture comes."""
        self._every = every
        self._connect(0.0)
        if not self._connection.answers():
            self.close()
            raise InputError(
                f"{self.name} gives no picture; check that it is on, its address, user and password, and that no "
                "other program holds it"
            )
        self._change(self._connection.newest())  # later pictures are compared with the first

    def frames(self, every: int, decoding: Decoding = PLAIN) -> Iterator[Frame | None]:
        """Always the newest frame, or one that tells of an outage; None when there is nothing new, for signals."""
        if self._connection is None:
            self.open(every)
        self._connection.taking = True
        self._up_since = self._good = time.monotonic()
        while True:
            shot = self._connection.take()
            limit = self.freeze + (self._pause if self._down == FROZEN else 0)
            trouble = self._connection.trouble(shot, limit) or self._change(shot)
            if trouble:
                yield self._reconnect(*trouble, shot)
            elif shot is None or (self._down == FROZEN and shot.still):
                yield None
            else:
                yield self._frame(shot, decoding)
            if self._down and self.give_up is not None and time.monotonic() - self._good >= self.give_up:
                raise CameraLost(None, f"no picture for {self.give_up:g} s (--give-up)", self.name)

    def close(self) -> None:
        """Release the camera. If Python ended while a thread is inside OpenCV, the process would abort."""
        connections = [*self._left, *([self._connection] if self._connection else [])]
        for connection in connections:
            connection.leaving = True
        end = time.monotonic() + ANSWER_SECONDS
        for connection in connections:
            connection.join(max(0.0, end - time.monotonic()))

    def _connect(self, pause: float) -> None:
        """Leave the present connection behind and start another."""
        before = self._connection
        if before:
            before.leaving = True
            self._left = [connection for connection in {*self._left, before} if connection.is_alive()]
            if len(self._left) > MOST_HUNG:
                return
        self._connection = Connection(self.address, self._every, self._numbers, pause, before)
        self._connection.start()

    def _reconnect(self, status: str, why: str, shot: Shot | None) -> Frame | None:
        """Connect again; returns what is told of it, which is nothing if it only goes on."""
        is_new = self._down is None or status in (RESIZED, GREY)
        if self._down is None and self._good - self._up_since > STEADY:
            self._pause = SHORTEST_PAUSE
        self._down = self._down or status
        # A frozen camera is listened to for longer each time, so that its return is seen at once.
        self._connect(self._pause if status in (LOST, SILENT) else SHORTEST_PAUSE)
        self._pause = min(self._pause * GROWTH, LONGEST_PAUSE)
        if not is_new:
            return None
        warn(f"{self.name}: {why}; connecting again")
        number, now = (shot.number, shot.time) if shot else (next(self._numbers), utc_now())
        return Frame(self.name, number, now, None, status)

    def _change(self, shot: Shot | None) -> tuple[str, str] | None:
        """What is other than before about a picture: its size, or that its colours are gone."""
        if shot is None or shot.image is None:
            return None
        size, before = shot.image.shape[1::-1], self._size
        was_grey, self._is_grey, self._size = self._is_grey, is_grey(shot.image), size
        self._had_color |= not self._is_grey
        if before not in (None, size):
            return RESIZED, f"its pictures were {before[0]}x{before[1]} and are {size[0]}x{size[1]} now"
        if self._is_grey and self._had_color and not was_grey:
            return GREY, "its pictures have turned grey"
        return None

    def _frame(self, shot: Shot, decoding: Decoding) -> Frame:
        image = None if shot.image is None else as_rgb(shot.image, decoding.bit_depth)
        if image is None:
            if not self._is_garbled:
                warn(f"{self.name}: a picture cannot be decoded")
            self._is_garbled = True
            return Frame(self.name, shot.number, shot.time, None, UNREADABLE)
        self._is_garbled = False
        now = time.monotonic()
        if self._down:
            warn(f"{self.name}: pictures again after {now - self._good:.1f} s")
            self._down, self._up_since = None, now
        self._good = now
        status = GREY if self._is_grey and self._had_color else OK
        return Frame(self.name, shot.number, shot.time, image, status, shot.read)


def is_grey(image: np.ndarray) -> bool:
    """Whether a picture (uint8 or uint16 [H, W] or [H, W, C]) has no colour, by every fourth row and column."""
    if image.ndim == 2 or image.shape[2] == 1:
        return True
    sample = image[::4, ::4, :3]
    return int((sample.max(2) - sample.min(2)).max()) <= 1  # decoders round


def as_rgb(image: np.ndarray, bit_depth: int) -> np.ndarray | None:
    """A picture as OpenCV gives it (BGR, BGRA, grey; 8 or `bit_depth` bits) as RGB uint8 [H, W, 3], None for others."""
    if image.dtype == np.uint16:
        image = levels(bit_depth)[image.clip(max=2**bit_depth - 1)]
    channels = 1 if image.ndim == 2 else image.shape[2]
    codes = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}
    return cv2.cvtColor(image, codes[channels]) if image.dtype == np.uint8 and channels in codes else None
