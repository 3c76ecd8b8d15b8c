"""Categories in MVTec layout, and their images as batches.

<root>/<category>/train/good/*.png
<root>/<category>/test/good/*.png, test/<defect>/*.png
<root>/<category>/ground_truth/<defect>/<stem>_mask.png
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from datasets.coalad import CATEGORY as COALAD
from datasets.images import EXTENSIONS, mask_to_tensor, read_image, read_mask, to_tensor
from utils import distributed
from utils.errors import InputError
from utils.signals import leave_signals_to_parent, stoppable


@dataclasses.dataclass(frozen=True)
class Item:
    """An image file; `mask` is the file of its anomalous region, None for a normal image."""

    path: Path
    name: str  # relative to the category, with "/"
    label: int = 0  # 1: anomalous
    mask: Path | None = None


class Category:
    """The files of one category; nothing is opened yet. `left_out`, item name -> reason, are not among its items."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.left_out: dict[str, str] = {}
        self.folder = Path(root) / name
        if not self.folder.is_dir():
            raise InputError(f"no category folder {self.folder}; check --data-root and --category")

    def train_items(self) -> list[Item]:
        """Normal training images in sorted path order; raises InputError if there are none."""
        items = self._items(self.folder / "train" / "good")
        if not items:
            raise InputError(f"{self.folder / 'train' / 'good'} has no {self._kind()}; add normal images")
        return items

    def test_items(self) -> list[Item]:
        """Test images in sorted path order, every folder but `good` being a defect.

        Raises InputError where there are none, a mask is missing, or two images of a folder share a stem
        (their masks and results would, too).
        """
        test = self.folder / "test"
        if not test.is_dir():
            raise InputError(f"no folder {test}; add test images, or pass --no-eval when training")
        items = []
        for folder in test.iterdir():
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            for item in self._items(folder):
                if folder.name != "good":
                    item = dataclasses.replace(item, label=1, mask=self._mask(item.path))
                items.append(item)
        if not items:
            raise InputError(f"{test} has no {self._kind()} in its folders; add some")
        _check_masks(items)
        items.sort(key=lambda item: item.name)
        seen: dict[tuple[Path, str], Item] = {}
        for item in items:
            other = seen.setdefault((item.path.parent, item.path.stem), item)
            if other is not item:
                raise InputError(f"{other.path} and {item.path} differ only in their extension; rename one")
        return items

    def _items(self, folder: Path) -> list[Item]:
        if not folder.is_dir():
            return []
        paths = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS and path.is_file()]
        paths = [path for path in paths if not path.name.startswith(".")]
        items = (Item(path, path.relative_to(self.folder).as_posix()) for path in paths)
        return sorted((item for item in items if item.name not in self.left_out), key=lambda item: item.name)

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


def _check_masks(items: Sequence[Item]) -> None:
    """Raise InputError where an anomalous image has no mask."""
    bare = [item.path for item in items if item.label and item.mask is None]
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
    items: Sequence[Item], train_ratio: float, holdout_ratio: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """Training images to fit on, and images held out, which depend on the list, the ratio and the seed alone.

    A train ratio under 1 takes the first int(ratio n) of the list shuffled by `random.Random(seed)`, in that
    order, as the authors' program does; ratio 1 keeps the sorted order. Raises InputError where no image is
    left to fit on, or fewer than two are held out.
    """
    held = set(random.Random(f"holdout {seed}").sample(range(len(items)), round(holdout_ratio * len(items))))
    if holdout_ratio and len(held) < 2:
        raise InputError(
            f"--holdout-ratio {holdout_ratio} of {len(items)} images holds {len(held)} out, "
            "and statistics need two; raise it"
        )
    rest = [item for index, item in enumerate(items) if index not in held]
    fitted = rest
    if train_ratio < 1:
        order = list(range(len(rest)))
        random.Random(seed).shuffle(order)
        fitted = [rest[index] for index in order[: int(train_ratio * len(rest))]]
    if not fitted:
        raise InputError(
            f"--train-ratio {train_ratio} and --holdout-ratio {holdout_ratio} leave none of {len(items)} "
            "images to fit on"
        )
    return fitted, [items[index] for index in sorted(held)]


class ImageDataset(Dataset):
    """Items as tensors: {"image" [3, S, S], "mask" bool [S, S], "label", "index"}.

    A file that cannot be read becomes {"error": exception}: raised, it would reach the user as the traceback of a
    worker process.
    """

    def __init__(self, items: Sequence[Item], image_size: int, resampling: str) -> None:
        self.items = list(items)
        self.image_size = image_size
        self.resampling = resampling

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        try:
            image = read_image(item.path)
            mask = torch.zeros(self.image_size, self.image_size, dtype=torch.bool)
            if item.mask is not None:
                mask = mask_to_tensor(read_mask(item.mask, image.size), self.image_size)
        except (InputError, OSError) as error:
            return {"error": error}
        tensor = to_tensor(image, self.image_size, self.resampling)
        return {"image": tensor, "mask": mask, "label": item.label, "index": index}


class ImageLoader:
    """Batches of this process's share of an ImageDataset, in order, with a progress bar.

    Raises UnreadableError at a broken file, OSError at one that cannot be reached.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, workers: int, description: str, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        self.description = description
        self.shard = distributed.shard(len(dataset), batch_size)
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=self.shard,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=_end_silently,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with tqdm(total=len(self.shard), desc=self.description, unit="image", leave=False, disable=None) as progress:
            for batch in stoppable(self.loader):
                distributed.check()
                if "error" in batch:
                    raise batch["error"]
                yield batch
                progress.update(len(batch["label"]))


def find_unreadable(items: Sequence[Item], workers: int) -> dict[str, str]:
    """Read every image and mask, and give the names of the items that cannot be read, with the reason."""
    loader = DataLoader(ImageDataset(items, 1, "bilinear"), None, num_workers=workers, worker_init_fn=_end_silently)
    samples = tqdm(stoppable(loader), total=len(items), desc="checking files", unit="image", leave=False, disable=None)
    errors = ((item.name, sample.get("error")) for item, sample in zip(items, samples, strict=True))
    return {name: str(error) for name, error in errors if error is not None}


def _end_silently(worker: int) -> None:
    """A worker leaves signals to the script, and the thread that hands its tensors over says nothing if that ends."""
    leave_signals_to_parent()
    sys.excepthook = _unless_connection_lost


def _unless_connection_lost(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    for sample in samples:
        if "error" in sample:
            return sample
    return default_collate(samples)
