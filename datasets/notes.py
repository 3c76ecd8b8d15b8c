"""Notes on files that can be read but may surprise: counted for each image, printed once a run."""

from __future__ import annotations

import torch

from datasets.images import Note
from utils import gather
from utils.command_line import warn_once

TEXTS = {
    Note.LABELS: "the masks hold labels, not black and white: every pixel that is not background counts as defect",
    Note.EMPTY: "the masks mark nothing, although they lie in a defect's folder: all their pixels count as normal",
    Note.DIM: "16 bits, of which under an eighth of the range is used: train with the --bit-depth of the camera, for "
    "instance 10 or 12",
    Note.REDUCED: "larger than --max-megapixels allows: the JPEG decoder gives them at a reduced scale",
}


class Notes:
    """Counts the notes on many files, and keeps an example of each kind."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(Note, 0)
        self._examples: dict[str, str] = {}

    def add(self, notes: int, image: object, mask: object = None) -> None:
        """Take in the notes on an image and its masks."""
        for note in Note:
            if note & notes:
                self._counts[note] += 1
                self._examples.setdefault(note.name, str(mask if note in Note.LABELS | Note.EMPTY else image))

    def say(self) -> None:
        """Warn of what all processes found: once a run, and of empty masks once for each data set."""
        counts = gather.all_rows(torch.tensor([list(self._counts.values())])).sum(0).tolist()
        examples = gather.all_entries(self._examples)
        for note, count in zip(Note, counts, strict=True):
            if count:
                example = examples[note.name]
                key = example if note is Note.EMPTY else note
                warn_once(key, f"{count} files, for instance {example}: {TEXTS[note]}")
