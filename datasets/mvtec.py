"""Categories in MVTec layout: their files, and which of them are fitted on or held out.

<root>/<category>/train/good/*.png
<root>/<category>/test/good/*.png, test/<defect>/*.png
<root>/<category>/ground_truth/<defect>/<stem>_mask.png, or <stem>.png, or several in a folder <stem>/

Images may lie in sub-folders of these, and their masks in sub-folders of the same names.
"""

import dataclasses
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from datasets import DOWNLOADS
from datasets.images import EXTENSIONS, PLAIN, Decoding, Note, Picture, find_files, read_mask, read_picture
from utils.command_line import warn_once
from utils.errors import InputError

MIN_HELD = 2  # held-out images: a mean and a spread need two
FEW = 5  # with fewer images, holding out two would cost too much unless it is asked for


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image file and the masks of its anomalous region; a normal image, or a defect without masks, has none."""

    path: Path
    name: str  # relative to the category, with "/"
    label: int = 0  # 1: anomalous
    masks: tuple[Path, ...] = ()
    decoding: Decoding = PLAIN

    @property
    def kind(self) -> str:
        """The folder below test/ that it lies in: `good`, or a defect's name."""
        return self.name.split("/")[1]

    @property
    def expected_mask(self) -> str:
        """Where its mask belongs, relative to the category."""
        return Path("ground_truth", *Path(self.name).parts[1:]).with_name(f"{self.path.stem}_mask.png").as_posix()

    def read(self) -> Picture:
        """See `datasets.images.read_picture`."""
        return read_picture(self.path, self.decoding)

    def read_mask(self, size: tuple[int, int] | None = None) -> tuple[np.ndarray, Note]:
        """Everything that its masks mark, bool [H, W]; see `datasets.images.read_mask`."""
        return read_mask(self.masks, size, self.decoding)


class Category:
    """The files of one category, none opened yet; `left_out` (name -> reason) are not among its samples."""

    def __init__(self, root: Path, name: str, decoding: Decoding = PLAIN) -> None:
        self.name = name
        self.decoding = decoding
        self.left_out: dict[str, str] = {}
        self.folder = Path(root) / name
        if not self.folder.is_dir():
            raise InputError(f"no category folder {self.folder}; check --data-root and --category")

    def train_samples(self) -> list[Sample]:
        """Normal training images in sorted path order; raises InputError if there are none."""
        return self._samples("train", self._places("train", ["good"]), f"{self.folder / 'train' / 'good'} has no")

    def test_samples(self) -> list[Sample]:
        """Test images in sorted path order; every folder except `good` is a defect.

        Raises InputError if there are none, if two images of a folder share a stem (and so their masks and results), or
        if some images of a defect have masks and others have none.
        """
        test, truth = self.folder / "test", self.folder / "ground_truth"
        if not self.has_tests:
            raise InputError(
                f"no folder {test}; add test images, or do without: train with --no-eval, and find thresholds with "
                "test_fusion.py --false-alarm-rate"
            )
        places = self._places("test")
        if other := {kind for kind in (place.parts[0] for place in places) if kind != "good" == kind.casefold()}:
            raise InputError(
                f"{test / min(other)}: normal images belong in {test / 'good'}, in small letters; rename it"
            )
        samples = self._samples("test", places, f"the folders in {test} have no", _Masks(truth, places).of)
        seen: dict[str, Sample] = {}
        for sample in samples:
            other = seen.setdefault(os.path.splitext(sample.name)[0], sample)
            if other is not sample:
                raise InputError(f"{other.path} and {sample.path} differ only in their extension; rename one")
        unmasked = defects_without_masks(samples)
        if bare := [item for item in samples if item.label and not item.masks and item.kind not in unmasked]:
            mask = self.folder / bare[0].expected_mask
            others = f", nor for {len(bare) - 1} other images" if len(bare) > 1 else ""
            raise InputError(
                f"no mask {mask} for {bare[0].path}{others}; add it (all black where nothing is to be marked), or move "
                f"{truth / bare[0].kind} away: without any masks the figures of images alone are computed"
            )
        return samples

    @property
    def has_tests(self) -> bool:
        """Whether there is a folder of test images."""
        return (self.folder / "test").is_dir()

    def _places(self, part: str, kinds: Sequence[str] | None = None) -> list[Path]:
        """Paths of the images in the folders (`kinds`, or all) of `part`; warns of images elsewhere in `part`."""
        folder = self.folder / part
        places = [path.relative_to(folder) for path in find_files(folder)] if folder.is_dir() else []
        taken = [place for place in places if place.parts[1:] and (kinds is None or place.parts[0] in kinds)]
        if passed_over := sorted(set(places).difference(taken)):
            where = " and ".join(f"{part}/{kind}" for kind in kinds or ["<defect>", "good"])
            example = f"{len(passed_over)} images, for instance {folder / passed_over[0]}"
            warn_once(folder, f"{example}, lie outside of {where} and are passed over")
        return taken

    def _samples(
        self, part: str, places: Sequence[Path], none: str, masks_of: Callable[[Path], tuple[Path, ...]] | None = None
    ) -> list[Sample]:
        """Samples of `places` but for those left out, sorted by name; without any an InputError begins with `none`."""
        samples = []
        for name, place in sorted((f"{part}/{place.as_posix()}", place) for place in places):
            if name not in self.left_out:
                anomalous = masks_of is not None and place.parts[0] != "good"
                masks = masks_of(place) if anomalous else ()
                samples.append(Sample(self.folder / name, name, int(anomalous), masks, self.decoding))
        if not samples:
            kind = f"{'readable ' if self.left_out else ''}images ({' '.join(sorted(EXTENSIONS))})"
            raise InputError(f"{none} {kind}; add some")
        return samples


class _Masks:
    """The mask files below `folder`, looked up by the paths of images below test/."""

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        folders = {image.parent for image in images}
        self._namesakes = Counter((image.parts[0], image.stem) for image in images)
        self._found: dict[str, list[Path]] = {}  # by <defect>/<stem>_mask, <defect>/<stem>, <defect>/<stem>/ (a folder)
        for path in sorted(find_files(folder)) if folder.is_dir() else ():
            place = path.relative_to(folder)
            stem = re.sub("_mask$", "_mask", place.stem, flags=re.IGNORECASE)
            self._found.setdefault((place.parent / stem).as_posix(), [path])
            if place.parent not in folders:  # else its masks are those of the images in the folder of that name
                self._found.setdefault(f"{place.parent.as_posix()}/", []).append(path)

    def of(self, image: Path) -> tuple[Path, ...]:
        """The masks of the image at this path: in its sub-folder or, if its name is unique, in the defect's folder."""
        places = [image.with_suffix("").as_posix()]
        if self._namesakes[image.parts[0], image.stem] == 1:
            places.append(f"{image.parts[0]}/{image.stem}")
        for place in places:
            for name in (f"{place}_mask", place, f"{place}/"):
                if name in self._found:
                    return tuple(self._found[name])
        return ()


def defects_without_masks(samples: Iterable[Sample]) -> list[str]:
    """The defects whose images have no masks at all; their pixels would make the pixel figures wrong."""
    anomalous = [sample for sample in samples if sample.label]
    return sorted({sample.kind for sample in anomalous} - {sample.kind for sample in anomalous if sample.masks})


def find_categories(root: Path, names: Sequence[str]) -> list[str]:
    """The categories asked for, each once, all of which are there or can be downloaded; `all`: what has train/good.

    Raises InputError for a folder that does not exist, unless it can be downloaded.
    """
    if os.path.lexists(root) and not Path(root).is_dir():
        raise InputError(f"--data-root {root} is no folder; give the one that holds <category>/train")
    if list(names) == ["all"]:
        folders = (path.parents[1] for path in Path(root).glob("*/train/good") if path.is_dir())
        names = sorted(folder.name for folder in folders if not folder.name.startswith("."))
        if not names:
            raise InputError(f"{root} holds no category (a folder with train/good in it); check --data-root")
    for name in names:
        if name not in DOWNLOADS:
            Category(root, name)
    return list(dict.fromkeys(names))


def open_category(root: Path, name: str, decoding: Decoding = PLAIN) -> Category:
    """The category's files, downloaded on first use if possible. Raises InputError if there are none."""
    if name in DOWNLOADS:
        DOWNLOADS[name](root)
    return Category(root, name, decoding)


def default_holdout(ratio: float, count: int) -> float:
    """The share of `count` images to hold out if `ratio` is only a default: at least two, or none of few images."""
    if round(ratio * count) >= MIN_HELD:
        return ratio
    return MIN_HELD / count if ratio and count >= FEW else 0.0


def split_training(
    samples: Sequence[Sample], train_ratio: float, holdout_ratio: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Training images to fit on, and held-out images, which depend only on the list, the ratio and the seed.

    A train ratio of 1 keeps the list's order; one below takes the first int(ratio n) of the shuffled list, in its
    order, as the authors' program does.
    Raises InputError if no image is left to fit on, or fewer than two are held out.
    """
    count = len(samples)
    held = set(random.Random(f"holdout {seed}").sample(range(count), round(holdout_ratio * count)))
    if holdout_ratio and len(held) < MIN_HELD:
        enough = f"{math.ceil(100 * MIN_HELD / count) / 100:g} or " if count >= FEW else ""
        raise InputError(
            f"--holdout-ratio {holdout_ratio:g} of {count} images holds {len(held)} out, and statistics need "
            f"{MIN_HELD}; give {enough}0, which holds none out, or add images to train/good"
        )
    if len(held) == count:
        raise InputError(f"--holdout-ratio {holdout_ratio:g} holds out all of {count} images; give 0, or add images")
    rest = [sample for index, sample in enumerate(samples) if index not in held]
    fitted = rest
    if train_ratio < 1:
        order = list(range(len(rest)))
        random.Random(seed).shuffle(order)
        fitted = [rest[index] for index in order[: int(train_ratio * len(rest))]]
    if not fitted:
        raise InputError(
            f"--train-ratio {train_ratio:g} and --holdout-ratio {holdout_ratio:g} leave none of {count} images to fit "
            f"on; give --train-ratio {math.ceil(100 / len(rest)) / 100:g} or more"
        )
    return fitted, [samples[index] for index in sorted(held)]
