"""Which frames of train/good a branch has learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from datasets.mvtec import Sample
from utils.errors import InputError
from utils.files import digest_of_lines


@dataclasses.dataclass(frozen=True)
class TrainingFrames:
    """Digests of the names of all frames that a branch has had, and of those among them that it holds out.

    A frame is known by its name, so that a data set can be moved and a million frames need not be read to find the new
    ones. A digest takes 8 bytes, whatever the name.
    """

    known: frozenset[int] = frozenset()
    held_out: frozenset[int] = frozenset()

    @classmethod
    def named(cls, names: Iterable[str], held_out: Iterable[str]) -> TrainingFrames:
        return cls(frozenset(map(mark, names)), frozenset(map(mark, held_out)))

    def not_fitted(self, samples: Iterable[Sample]) -> list[Sample]:
        """Those of the samples that a branch was not fitted on: unknown or held out."""
        fitted = self.known - self.held_out
        return [sample for sample in samples if mark(sample.name) not in fitted]

    def state(self) -> dict[str, Tensor]:
        """Two sorted int64 tensors for a checkpoint; none if no frame is known."""
        marks = {"frames": self.known, "frames_held_out": self.held_out} if self.known else {}
        return {name: torch.tensor(sorted(own), dtype=torch.int64) for name, own in marks.items()}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor]) -> TrainingFrames:
        """The frames of a checkpoint, none for those of earlier versions; raises InputError if they are damaged."""
        none = torch.tensor([], dtype=torch.int64)
        known, held_out = (tensors.get(name, none) for name in ("frames", "frames_held_out"))
        if any(marks.dtype != torch.int64 or marks.dim() != 1 for marks in (known, held_out)):
            raise InputError("the tensors 'frames' and 'frames_held_out' are no lists of digests")
        return cls(frozenset(known.tolist()), frozenset(held_out.tolist()))


def mark(name: str) -> int:
    """60 bits of the digest of a name."""
    return int(digest_of_lines([name])[:15], 16)
