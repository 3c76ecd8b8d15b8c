"""Where frames come from: image files, folders, patterns, video files, and cameras."""

import glob
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2

from datasets.camera import Camera
from datasets.connection import CAMERA_SCHEMES
from datasets.frames import Frame
from datasets.images import EXTENSIONS, PLAIN, Decoding, Notes, find_files, read_picture
from utils.command_line import warn
from utils.errors import InputError
from utils.safe_text import redact

VIDEO_EXTENSIONS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts"}
KNOWN = EXTENSIONS | VIDEO_EXTENSIONS
DEFAULT_FPS = 25.0  # of a video without a frame rate
MOST_BROKEN = 10_000  # frames of a video in a row; then it is taken to have ended, whatever length it announces


class Images:
    dropped = 0

    def __init__(self, paths: Sequence[Path]) -> None:  # of one folder
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
    dropped = 0

    def __init__(self, path: Path) -> None:
        self.paths = [path]
        self.name = path.as_posix()
        self.fps = DEFAULT_FPS
        self.problems: list[str] = []

    def frames(self, every: int, _: Decoding = PLAIN) -> Iterator[Frame]:
        """Every N-th frame; a file that cannot be read goes to `problems`, one that lacks frames is warned of."""
        # An absolute path: FFmpeg takes the beginning of a name such as "http:a.mp4" for a protocol.
        capture = cv2.VideoCapture(str(self.paths[0].absolute()), cv2.CAP_FFMPEG)
        try:
            fps = capture.get(cv2.CAP_PROP_FPS)
            self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS
            expected = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            number = read = broken = 0
            while (whole := capture.grab()) or (number < expected and broken < MOST_BROKEN):  # others may follow
                if whole and number % every == 0:
                    seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                    whole, image = capture.retrieve()
                    if whole:
                        yield Frame(self.name, number, round(seconds, 3), cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
                number, read, broken = number + 1, read + whole, 0 if whole else broken + 1
        finally:
            capture.release()
        if read == 0:
            self.problems.append(f"{self.name} cannot be read as a video; repair it, or convert it to MP4")
        elif read < expected:
            warn(f"{self.name} announces {expected:.0f} frames, {read} could be read")


Source = Images | Video | Camera


def find_sources(arguments: Sequence[str], freeze: float | None = None, give_up: float | None = None) -> list[Source]:
    """The sources that the arguments of a command line name, in order; images of one folder form one source.

    Raises InputError for a path that does not exist, an unknown kind of file, and a camera beside other sources.
    """
    cameras = [text for text in arguments if _is_camera(text)]
    if cameras and len(arguments) > 1:
        raise InputError(
            f"a camera ({redact(cameras[0])}) never ends and must be the only SOURCE; start predict.py once for each"
        )
    if cameras:
        return [Camera(cameras[0], freeze, give_up)]
    paths = [path for text in arguments for path in _files(text)]
    sources: list[Source] = []
    for folder, group in itertools.groupby(paths, lambda path: None if is_video(path) else path.parent):
        files = list(group)
        sources.extend(map(Video, files) if folder is None else [Images(files)])
    return sources


def _is_camera(text: str) -> bool:
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", text)
    if scheme and scheme[1].lower() not in CAMERA_SCHEMES:
        raise InputError(f"{redact(text)}: cameras are reached by {', '.join(CAMERA_SCHEMES)}")
    return bool(scheme) or (text.isascii() and text.isdigit() and not Path(text).exists())


def is_video(path: Path) -> bool:
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
    return sorted(found, key=lambda file: (file.parent, is_video(file), file.name))
