"""What may surprise about files that can be read: counted image by image, said once a run."""

from datasets.images import Note
from utils import distributed
from utils.command_line import warn_once

TEXTS = {
    Note.LABELS: "the masks hold labels, not black and white: every pixel that is not background counts as defect",
    Note.EMPTY: "the masks mark nothing, although they lie in a defect's folder: all their pixels count as normal",
    Note.DIM: "16 bits, of which under an eighth of the range is used: train with the --bit-depth of the camera, for "
    "instance 10 or 12",
    Note.REDUCED: "larger than --max-megapixels allows: the JPEG decoder gives them at a reduced scale",
    Note.PAGES: "of several pages only the first is looked at; save the others that count as files of their own",
}


class Notes:
    """Counts the notes on many files, with an example of each kind."""

    def __init__(self) -> None:
        self._found: dict[Note, tuple[int, str]] = {}

    def add(self, notes: int, image: object, mask: object = None) -> None:
        """Take in the notes on an image and its masks."""
        for note in Note:
            if note & notes:
                count, example = self._found.get(note, (0, str(mask if note in Note.LABELS | Note.EMPTY else image)))
                self._found[note] = count + 1, example

    def say(self) -> None:
        """Warn of what all processes have found: once a run, and of empty masks once for each data set."""
        parts = distributed.gathered(self._found)
        for note, text in TEXTS.items():
            found = [part[note] for part in parts if note in part]
            if found:
                count, example = sum(count for count, _ in found), found[0][1]
                key = example if note is Note.EMPTY else note
                warn_once(key, f"{count} files, for instance {example}: {text}")
