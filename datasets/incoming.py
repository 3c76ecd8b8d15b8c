"""A folder that receives new files: each once, when it is complete. One is known by its name and modification time."""

import os
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

from datasets.frames import DONE, OK, UNREADABLE, Frame, is_of_file
from datasets.images import PLAIN, Decoding, find_files
from datasets.sources import KNOWN, Images, Video, is_video
from utils.command_line import warn
from utils.safe_text import safe_cell

POLL = 0.5  # seconds between two looks into the folder
SETTLED, VIDEO_SETTLED = 1.0, 10.0  # seconds without a change after which a file is complete
PATIENCE = 10.0  # seconds without a change after which a file that cannot be read is broken


class Incoming:
    """A folder that is watched; its images and videos form one source."""

    dropped = 0
    problems = ()  # each is told at once, and has a row

    def __init__(self, folder: Path) -> None:
        self.paths = [folder]
        self.name = folder.as_posix()
        self._done: set[int] = set()  # hashes, for there may be millions
        self._begun: dict[str, int] = {}  # by name of a video: the last frame that was looked at
        self._files = 0
        self._changed: dict[Path, tuple[tuple[int, int], float]] = {}  # size and time, and since when they are so
        self._is_there = True

    def skip(self, files: int, last: Mapping[str, tuple[str, str]]) -> None:
        """Leave out what has rows: so many files, and frame number and time of the last row by source, as texts."""
        for source, (number, moment) in last.items():
            if is_of_file(moment):
                self._done.add(hash((_place(source), moment)))
            else:
                self._begun[_place(source)] = int(number)
        self._files = files

    def frames(self, every: int, decoding: Decoding = PLAIN) -> Iterator[Frame | None]:
        """The frames of all files, some without a picture, for ever; None when there is nothing new, for signals."""
        while True:
            for path, moment, key in self._complete():
                yield from self._look(path, moment, key, decoding)
            yield None
            time.sleep(POLL)

    def _complete(self) -> list[tuple[Path, str, int]]:
        """The complete files that were not looked at, with modification time and hash, in the order of that time."""
        now, changed, complete = time.monotonic(), {}, []
        for path in self._files_there():
            try:
                stat = path.stat()
            except OSError:
                continue  # it has just been taken away
            moment = datetime.fromtimestamp(stat.st_mtime, timezone.utc).isoformat(timespec="microseconds")
            key = hash((_place(path.as_posix()), moment))
            if key in self._done:
                continue
            state = stat.st_size, stat.st_mtime_ns
            before, since = self._changed.get(path, (None, now))
            changed[path] = state, since if state == before else now
            if now - changed[path][1] >= (VIDEO_SETTLED if is_video(path) else SETTLED):
                complete.append((stat.st_mtime_ns, path, moment, key))
        self._changed = changed
        return [found for _, *found in sorted(complete)]

    def _files_there(self) -> list[Path]:
        """All files of the folder; none while it cannot be read, as a share that is not connected."""
        try:
            found = list(find_files(self.paths[0], KNOWN))
        except OSError as error:
            if self._is_there:
                warn(f"{self.name} cannot be read ({error.strerror}); it is tried again")
            self._is_there = False
            return []
        if not self._is_there:
            warn(f"{self.name} can be read again")
        self._is_there = True
        return found

    def _look(self, path: Path, moment: str, key: int, decoding: Decoding) -> Iterator[Frame]:
        """The frames of one file; none if it was taken away, or cannot be read yet."""
        source, number, picture = path.as_posix(), self._files, None
        reader = Video(path) if is_video(path) else Images([path])
        begun = self._begun.pop(_place(source), -1)
        for frame in reader.frames(1, decoding):
            if isinstance(reader, Images):
                picture = frame.image
            else:
                number = frame.number
                if number > begun:
                    yield frame
        if reader.problems:
            if not path.exists() or time.monotonic() - self._changed[path][1] < PATIENCE:
                return
            warn(reader.problems[0])
        status = UNREADABLE if reader.problems else DONE if picture is None else OK
        yield Frame(source, number, moment, picture, status)
        self._files += 1
        self._done.add(key)


def _place(source: str) -> str:
    """The same text for a file's path, relative or absolute, and for the cell of the table that holds it."""
    return os.path.abspath(safe_cell(source))
