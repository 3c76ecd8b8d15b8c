"""Categories in MVTec layout: which files there are, and which of them are fitted on or held out.

<root>/<category>/train/good/*.png
<root>/<category>/test/good/*.png, test/<defect>/*.png
<root>/<category>/ground_truth/<defect>/<stem>_mask.png
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from pathlib import Path

from datasets.coalad import CATEGORY as COALAD
from datasets.images import EXTENSIONS
from utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image file; `mask` is the file of its anomalous region, None for a normal image."""

    path: Path
    name: str  # relative to the category, with "/"
    label: int = 0  # 1: anomalous
    mask: Path | None = None


class Category:
    """The files of one category; nothing is opened yet. `left_out`, name -> reason, are not among its samples."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.left_out: dict[str, str] = {}
        self.folder = Path(root) / name
        if not self.folder.is_dir():
            raise InputError(f"no category folder {self.folder}; check --data-root and --category")

    def train_samples(self) -> list[Sample]:
        """Normal training images in sorted path order; raises InputError if there are none."""
        samples = self._samples(self.folder / "train" / "good")
        if not samples:
            raise InputError(f"{self.folder / 'train' / 'good'} has no {self._kind()}; add normal images")
        return samples

    def test_samples(self) -> list[Sample]:
        """Test images in sorted path order, every folder but `good` being a defect.

        Raises InputError where there are none, a mask is missing, or two images of a folder share a stem
        (their masks and results would, too).
        """
        test = self.folder / "test"
        if not test.is_dir():
            raise InputError(f"no folder {test}; add test images, or pass --no-eval when training")
        samples = []
        for folder in test.iterdir():
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            for sample in self._samples(folder):
                if folder.name != "good":
                    sample = dataclasses.replace(sample, label=1, mask=self._mask(sample.path))
                samples.append(sample)
        if not samples:
            raise InputError(f"{test} has no {self._kind()} in its folders; add some")
        _check_masks(samples)
        samples.sort(key=lambda sample: sample.name)
        seen: dict[tuple[Path, str], Sample] = {}
        for sample in samples:
            other = seen.setdefault((sample.path.parent, sample.path.stem), sample)
            if other is not sample:
                raise InputError(f"{other.path} and {sample.path} differ only in their extension; rename one")
        return samples

    def _samples(self, folder: Path) -> list[Sample]:
        if not folder.is_dir():
            return []
        paths = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file()]
        paths = [path for path in paths if not path.name.startswith(".")]
        samples = (Sample(path, path.relative_to(self.folder).as_posix()) for path in paths)
        kept = (sample for sample in samples if sample.name not in self.left_out)
        return sorted(kept, key=lambda sample: sample.name)

    def _kind(self) -> str:
        return f"{'readable ' if self.left_out else ''}images ({' '.join(sorted(EXTENSIONS))})"

    def _mask(self, image: Path) -> Path | None:
        folder = self.folder / "ground_truth" / image.parent.name
        for stem in (f"{image.stem}_mask", image.stem):
            for extension in sorted(EXTENSIONS):
                for suffix in (extension, extension.upper()):
                    if (folder / (stem + suffix)).is_file():
                        return folder / (stem + suffix)
        return None


def _check_masks(samples: Sequence[Sample]) -> None:
    """Raise InputError where an anomalous image has no mask."""
    bare = [sample.path for sample in samples if sample.label and sample.mask is None]
    if bare:
        mask = bare[0].parents[2] / "ground_truth" / bare[0].parent.name / f"{bare[0].stem}_mask.png"
        others = f", nor for {len(bare) - 1} other images" if len(bare) > 1 else ""
        raise InputError(f"no mask {mask} for {bare[0]}{others}; add it, or move the image to test/good")


def find_categories(root: Path, names: Sequence[str]) -> list[str]:
    """The categories asked for, each once; `all` stands for every folder of `root` with train/good in it.

    Raises InputError where there is no such folder, unless it is CoalAD's, which can be downloaded.
    """
    if os.path.lexists(root) and not Path(root).is_dir():
        raise InputError(f"--data-root {root} is no folder; give the one that holds <category>/train")
    if list(names) == ["all"]:
        folders = (path.parents[1] for path in Path(root).glob("*/train/good") if path.is_dir())
        names = sorted(folder.name for folder in folders if not folder.name.startswith("."))
        if not names:
            raise InputError(f"{root} holds no category (a folder with train/good in it); check --data-root")
    for name in names:
        if name != COALAD:
            Category(root, name)
    return list(dict.fromkeys(names))


def split_training(
    samples: Sequence[Sample], train_ratio: float, holdout_ratio: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Training images to fit on, and images held out, which depend on the list, the ratio and the seed alone.

    A train ratio under 1 takes the first int(ratio n) of the list shuffled by `random.Random(seed)`, in that
    order, as the authors' program does; ratio 1 keeps the sorted order. Raises InputError where no image is
    left to fit on, or fewer than two are held out.
    """
    held = set(random.Random(f"holdout {seed}").sample(range(len(samples)), round(holdout_ratio * len(samples))))
    if holdout_ratio and len(held) < 2:
        raise InputError(
            f"--holdout-ratio {holdout_ratio} of {len(samples)} images holds {len(held)} out, "
            "and statistics need two; raise it"
        )
    rest = [sample for index, sample in enumerate(samples) if index not in held]
    fitted = rest
    if train_ratio < 1:
        order = list(range(len(rest)))
        random.Random(seed).shuffle(order)
        fitted = [rest[index] for index in order[: int(train_ratio * len(rest))]]
    if not fitted:
        raise InputError(
            f"--train-ratio {train_ratio} and --holdout-ratio {holdout_ratio} leave none of {len(samples)} "
            "images to fit on"
        )
    return fitted, [samples[index] for index in sorted(held)]
