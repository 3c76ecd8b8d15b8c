"""One connection to a camera, read by a thread of its own, which can be left behind where OpenCV hangs."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np

from datasets.frames import FROZEN, LOST, SILENT

PORTS = {"rtsp": 554, "rtsps": 322, "rtmp": 1935, "http": 80, "https": 443}
CAMERA_SCHEMES = (*PORTS, "udp", "rtp", "srt")
ANSWER_SECONDS = 10.0  # a camera that gives no picture for so long after connecting counts as absent
TICK = 0.5  # seconds after which signals and limits are looked at though no picture has come

# What OpenCV and FFmpeg print by themselves may hold a camera's address.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
(cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(0)  # silent; OpenCV 4.13 moved it


class Shot(NamedTuple):
    number: int
    time: str  # UTC
    read: float  # time.perf_counter()
    image: np.ndarray | None  # as OpenCV gives it; None if it could not be decoded
    still: bool  # it is the same as the picture before


class Connection(threading.Thread):
    """Waits for a pause, connects, and keeps the newest picture until it is taken."""

    def __init__(
        self, address: str, every: int, numbers: Iterator[int], pause: float = 0.0, before: Connection | None = None
    ) -> None:
        super().__init__(daemon=True)
        self.address, self.every, self.numbers, self.pause = address, every, numbers, pause
        self.taking = before is not None  # frames before the first `take` are not counted as dropped
        self.dropped = before.dropped if before else 0
        self.leaving = self.ended = self.has_pictures = False
        self._news = threading.Condition()
        self._newest: Shot | None = None
        self._last = before and before._last
        self._gone = before is not None and before._gone  # the source could not be reached
        self._heard = self._changed = float("inf")  # time.monotonic() of the last picture, and of the last change

    def answers(self) -> bool:
        """Wait for the first picture, ANSWER_SECONDS at most; returns whether there is one."""
        end = time.monotonic() + ANSWER_SECONDS
        with self._news:
            while not (self.has_pictures or self.ended) and time.monotonic() < end:
                self._news.wait(TICK)  # on Windows Ctrl-C is not seen during it
        return self.has_pictures

    def newest(self) -> Shot | None:
        """The newest picture, which remains to be taken."""
        return self._newest

    def take(self) -> Shot | None:
        """The newest picture, or None if none comes within a TICK."""
        with self._news:
            if self._newest is None:
                self._news.wait(TICK)
            shot, self._newest = self._newest, None
            return shot

    def trouble(self, shot: Shot | None, limit: float) -> tuple[str, str] | None:
        """Why there is nothing after `shot`, as status and words: the connection ended, or `limit` seconds passed."""
        now = time.monotonic()
        if self.ended and shot is None and self._newest is None:
            return LOST, "the connection broke" if self.has_pictures else "there is no connection"
        limit = limit if self.has_pictures else ANSWER_SECONDS
        if now - self._heard > limit:
            return SILENT, f"no picture for {limit:g} s"
        if now - self._changed > limit:
            return FROZEN, f"the same picture for {limit:g} s"
        return None

    def run(self) -> None:
        capture = None
        try:
            self._wait()
            self._heard = self._changed = time.monotonic()
            capture = None if self.leaving else _open_capture(self.address)
            while not self.leaving and capture.grab() and not self.leaving:
                read, number = time.perf_counter(), next(self.numbers)
                if number % self.every == 0:
                    ok, image = capture.retrieve()
                    self._publish(number, read, image if ok else None)
        except cv2.error:
            pass  # the connection ends here
        finally:
            with self._news:
                self.ended = True
                self._news.notify_all()
            if capture is not None:
                capture.release()

    def _wait(self) -> None:
        """The pause; it ends early once a source that could not be reached can be reached again."""
        end = time.monotonic() + self.pause
        while (left := end - time.monotonic()) > 0 and not self.leaving:
            was_gone, self._gone = self._gone, not _is_reachable(self.address)
            if was_gone and not self._gone:
                return
            time.sleep(min(left, TICK))

    def _publish(self, number: int, read: float, image: np.ndarray | None) -> None:
        still = image is None or self._is_last(image)
        if image is not None:
            self._heard, self._last = time.monotonic(), image
            self._changed = self._changed if still and self.has_pictures else self._heard
        with self._news:
            if self._newest is not None:
                self.dropped += self.taking
                still = still and self._newest.still
            self._newest = Shot(number, utc_now(), read, image, still)
            self.has_pictures |= image is not None
            self._news.notify_all()

    def _is_last(self, image: np.ndarray) -> bool:
        """Whether a picture is the one before; mostly a few rows tell that it is not."""
        last = self._last
        return last is not None and all(np.array_equal(image[::step], last[::step]) for step in (32, 1))


class MotionJpeg:
    """A stream of JPEG files, decoded here: FFmpeg ends at a broken file, and stretches those of another size."""

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self.capture = capture
        self.grab, self.release = capture.grab, capture.release

    def retrieve(self) -> tuple[bool, np.ndarray | None]:
        ok, data = self.capture.retrieve()
        image = cv2.imdecode(data, cv2.IMREAD_COLOR) if ok else None
        return image is not None, image


def _open_capture(address: str) -> cv2.VideoCapture | MotionJpeg:
    if address.isdigit():
        return cv2.VideoCapture(int(address))
    limit = int(ANSWER_SECONDS * 800)  # milliseconds: gives up before the main thread stops waiting
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    capture = cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)
    is_jpeg = int(capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter_fourcc(*"MJPG")
    return MotionJpeg(capture) if is_jpeg and capture.set(cv2.CAP_PROP_FORMAT, -1) else capture


def _is_reachable(address: str) -> bool:
    """Whether connecting may succeed, as far as can be told without it."""
    if address.isdigit():
        return not sys.platform.startswith("linux") or os.path.exists(f"/dev/video{address}")
    try:
        url = urlsplit(address)
        with socket.create_connection((url.hostname, url.port or PORTS[url.scheme]), timeout=1):
            return True
    except (KeyError, ValueError):  # no such way to ask
        return True
    except OSError:
        return False


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
