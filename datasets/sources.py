"""Where frames come from: image files, folders, patterns, video files, and cameras.

Files give every frame, in order. A camera gives its newest frame: frames that arrive while one is being processed are
dropped and counted, so that the result is never late.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np

from datasets.images import EXTENSIONS, PLAIN, Decoding, Picture, find_files, read_picture
from datasets.notes import Notes
from utils.command_line import warn
from utils.errors import InputError
from utils.redact import redact

VIDEO_EXTENSIONS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts"}
KNOWN = EXTENSIONS | VIDEO_EXTENSIONS
CAMERA_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "rtp", "srt")
ANSWER_SECONDS = 10.0  # a camera that gives no frame for so long counts as absent
DEFAULT_FPS = 25.0  # of a video without a frame rate

# What OpenCV and FFmpeg print by themselves may hold a camera's address.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
(cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2).setLogLevel(0)  # silent; OpenCV 4.13 moved it


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture and where it comes from."""

    source: str  # path, or a camera's address without its password
    number: int  # from 0, in the folder, the video, or of all that the camera sent
    time: float | str  # a video: seconds from its start; a camera: UTC; an image: ""
    image: Picture | np.ndarray  # RGB, uint8 [H, W, 3] if an array

    @property
    def pixels(self) -> np.ndarray:
        """RGB, uint8 [h, w, 3], perhaps at a reduced scale."""
        return np.asarray(self.image.image if isinstance(self.image, Picture) else self.image)


class Images:
    """Images of one folder."""

    fps = None
    dropped = 0

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.name = self.paths[0].parent.as_posix()
        self.problems: list[str] = []

    def frames(self, every: int, decoding: Decoding = PLAIN) -> Iterator[Frame]:
        """Every N-th image; one that cannot be read goes to `problems`."""
        notes = Notes()
        for number, path in list(enumerate(self.paths))[::every]:
            try:
                picture = read_picture(path, decoding)
            except (InputError, OSError) as error:
                self.problems.append(str(error))
                continue
            notes.add(picture.notes, path)
            yield Frame(path.as_posix(), number, "", picture)
        notes.say()


class Video:
    """A video file."""

    dropped = 0

    def __init__(self, path: Path) -> None:
        self.paths = [path]
        self.name = path.as_posix()
        self.fps = DEFAULT_FPS
        self.problems: list[str] = []

    def frames(self, every: int, _: Decoding = PLAIN) -> Iterator[Frame]:
        """Every N-th frame; a file that cannot be read, or not to its end, goes to `problems`."""
        # An absolute path: FFmpeg takes the beginning of a name such as "http:a.mp4" for a protocol.
        capture = cv2.VideoCapture(str(self.paths[0].absolute()), cv2.CAP_FFMPEG)
        try:
            fps = capture.get(cv2.CAP_PROP_FPS)
            self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS
            expected = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            number = 0
            while capture.grab():
                if number % every == 0:
                    seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                    ok, image = capture.retrieve()
                    if not ok:
                        break
                    yield Frame(self.name, number, round(seconds, 3), cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
                number += 1
        finally:
            capture.release()
        if number == 0:
            self.problems.append(f"{self.name} cannot be read as a video; repair it, or convert it to MP4")
        elif number < expected:
            warn(f"{self.name} announces {expected:.0f} frames, {number} could be read")


class Camera:
    """A camera's number, or the address of a stream, read by a thread that keeps only the newest frame."""

    fps = None

    def __init__(self, address: str) -> None:
        self.paths: list[Path] = []
        self.address = address
        self.name = f"camera {address}" if address.isdigit() else redact(address)
        self.dropped = 0
        self.problems: list[str] = []
        self._every = 1
        self._news = threading.Condition()
        self._newest: Frame | None = None
        self._ended = self._stopping = False
        self._taking = False  # frames before the first call are not counted as dropped
        self._thread = threading.Thread(target=self._read, daemon=True)

    def open(self, every: int) -> None:
        """Start reading; raises InputError unless a frame comes within ANSWER_SECONDS."""
        self._every = every
        self._thread.start()
        with self._news:
            self._wait(ANSWER_SECONDS)
            answered = self._newest is not None
        if not answered:
            self.close()
            raise InputError(
                f"{self.name} gives no picture; check that it is on, its address, user and password, and that no "
                "other program holds it"
            )

    def frames(self, every: int, _: Decoding = PLAIN) -> Iterator[Frame]:
        """Always the newest frame, until the stream ends or sends nothing for ANSWER_SECONDS."""
        if self._thread.ident is None:
            self.open(every)
        while True:
            with self._news:
                self._taking = True
                self._wait(ANSWER_SECONDS)
                frame, self._newest = self._newest, None
            if frame is None:
                return
            yield frame

    def close(self) -> None:
        """Release the camera. If Python ended while the thread is inside OpenCV, the process would abort."""
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join(timeout=ANSWER_SECONDS)

    def _wait(self, seconds: float) -> None:
        """Wait for a frame or the end, in short steps: Windows delivers no Ctrl-C during a wait."""
        end = time.monotonic() + seconds
        while self._newest is None and not self._ended and (left := end - time.monotonic()) > 0:
            self._news.wait(min(left, 0.5))

    def _read(self) -> None:
        capture = None
        try:
            capture = _open_capture(self.address)
            for number in itertools.count():
                if self._stopping or not capture.grab():
                    break
                if number % self._every == 0:
                    ok, image = capture.retrieve()
                    if not ok:
                        break
                    self._publish(number, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        except cv2.error:
            pass  # OpenCV cannot decode a picture: the stream ends here with a message
        finally:
            with self._news:
                self._ended = True
                self._news.notify_all()
            if capture is not None:
                capture.release()

    def _publish(self, number: int, image: np.ndarray) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        with self._news:
            if self._taking and self._newest is not None:
                self.dropped += 1
            self._newest = Frame(self.name, number, now, image)
            self._news.notify_all()


def _open_capture(address: str) -> cv2.VideoCapture:
    if address.isdigit():
        return cv2.VideoCapture(int(address))
    limit = int(ANSWER_SECONDS * 800)  # milliseconds: gives up before the main thread stops waiting
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)


Source = Images | Video | Camera


def find_sources(arguments: Sequence[str]) -> list[Source]:
    """The sources that the arguments of a command line name, in order; images of one folder form one source.

    Raises InputError for a path that does not exist, an unknown kind of file, and a camera beside other sources.
    """
    cameras = [text for text in arguments if _is_camera(text)]
    if cameras and len(arguments) > 1:
        raise InputError(
            f"a camera ({redact(cameras[0])}) never ends and must be the only SOURCE; start predict.py once for each"
        )
    if cameras:
        return [Camera(cameras[0])]
    paths = [path for text in arguments for path in _files(text)]
    sources: list[Source] = []
    for folder, group in itertools.groupby(paths, lambda path: None if _is_video(path) else path.parent):
        files = list(group)
        sources.extend(map(Video, files) if folder is None else [Images(files)])
    return sources


def _is_camera(text: str) -> bool:
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", text)
    if scheme and scheme[1].lower() not in CAMERA_SCHEMES:
        raise InputError(f"{redact(text)}: cameras are reached by {', '.join(CAMERA_SCHEMES)}")
    return bool(scheme) or (text.isascii() and text.isdigit() and not Path(text).exists())


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_EXTENSIONS


def _files(text: str) -> list[Path]:
    """The image and video files that one argument names."""
    path = Path(text)
    if path.is_dir():
        found = list(find_files(path, KNOWN))
    elif path.exists():
        if path.suffix.lower() not in KNOWN:
            known = " ".join(sorted(KNOWN))
            raise InputError(f"{path} is neither an image nor a video by its name ({known}); rename or convert it")
        return [path]
    elif glob.has_magic(text):
        matches = map(Path, glob.glob(text, recursive=True))
        found = [file for file in matches if file.suffix.lower() in KNOWN and file.is_file()]
    else:
        raise InputError(f"{path} does not exist; give an image, a folder, a pattern, a video or a camera")
    if not found:
        raise InputError(f"{text} holds no image or video ({' '.join(sorted(KNOWN))})")
    return sorted(found, key=lambda file: (file.parent, file.name))
