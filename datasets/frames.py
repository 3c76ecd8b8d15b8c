"""One frame of whatever source, and what became of it."""

import dataclasses
import time

import numpy as np

from datasets.images import Picture

OK = "ok"
UNREADABLE = "unreadable"  # a picture or file that cannot be decoded
DONE = "done"  # a video in a watched folder has ended
LOST = "lost"  # a camera's connection broke
SILENT = "silent"  # a camera sends no picture
FROZEN = "frozen"  # a camera sends the same picture again and again
RESIZED = "resized"  # a camera's pictures have another size
GREY = "grey"  # a colour camera's pictures have no colour
STATUSES = (OK, UNREADABLE, DONE, LOST, SILENT, FROZEN, RESIZED, GREY)


def is_of_file(moment: str) -> bool:
    """Whether a time in a watched folder's table is that of a file that is done, not the seconds of a video."""
    return "T" in moment


@dataclasses.dataclass(frozen=True)
class Frame:
    """One picture and where it comes from; without a picture, what happened instead of it."""

    source: str  # path, or a camera's address without its password
    number: int  # from 0, in the folder, the video, or of all that the camera sent
    time: float | str  # a video: seconds from its start; a camera: UTC; an image: ""
    image: Picture | np.ndarray | None  # RGB, uint8 [H, W, 3] if an array
    status: str = OK
    read: float = dataclasses.field(default_factory=time.perf_counter)  # when it was read

    @property
    def pixels(self) -> np.ndarray:
        """RGB, uint8 [h, w, 3], perhaps at a reduced scale."""
        return np.asarray(self.image.image if isinstance(self.image, Picture) else self.image)
