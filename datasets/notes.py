"""What may surprise about files that can be read: counted image by image, said once a run."""

from __future__ import annotations

from collections.abc import Callable

from datasets.images import Note
from utils import distributed
from utils.command_line import warn_once

TEXTS = {
    Note.LABELS: "the masks hold labels, not black and white: every pixel that is not background counts as defect",
    Note.EMPTY: "the masks mark nothing, although they lie in a defect's folder: all their pixels count as normal",
    Note.DIM: "16 bits, of which under an eighth of the range is used: train with the --bit-depth of the camera, for "
    "instance 10 or 12",
    Note.REDUCED: "larger than --max-megapixels allows: the JPEG decoder gives them at a reduced scale",
}


class Notes:
    """Counts the notes on many files, with an example of each kind."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Note, 0)
        self._examples: dict[Note, object] = {}

    def add(self, notes: int, image: object, mask: object = None) -> None:
        """Take in the notes on an image and its masks."""
        for note in Note:
            if note & notes:
                self._counts[note] += 1
                self._examples.setdefault(note, mask if note in Note.LABELS | Note.EMPTY else image)

    def say(self, share: Callable[[dict[str, str]], dict[str, str]] = dict) -> None:
        """Warn of what was found: once a run, and of empty masks once for each data set.

        With several processes `share` turns the entries of this one into those of all.
        """
        own = {note: f"{count} {self._examples[note]}" for note, count in self._counts.items() if count}
        everything = share({f"{note.value} {distributed.rank()}": entry for note, entry in own.items()})
        for note, text in TEXTS.items():
            entries = [entry.split(" ", 1) for key, entry in everything.items() if key.startswith(f"{note.value} ")]
            if entries:
                count, example = sum(int(count) for count, _ in entries), entries[0][1]
                key = example if note is Note.EMPTY else note
                warn_once(key, f"{count} files, for instance {example}: {text}")
