"""Samples as tensors, and tensors as batches: what the networks see."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from datasets.images import Notes, stretched
from datasets.mvtec import Category, Sample
from datasets.region import RegionOfInterest
from utils import distributed
from utils.command_line import warn
from utils.errors import InputError, UnreadableError
from utils.signals import leave_signals_to_parent, stoppable

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_tensor(image: Image.Image, size: int, resampling: str) -> Tensor:
    """RGB image -> [3, size, size]: stretched to the square (antialiased), to [0, 1], ImageNet-normalised."""
    tensor = torch.from_numpy(stretched(image, size, resampling)).permute(2, 0, 1).float() / 255
    return (tensor - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def mask_to_tensor(mask: np.ndarray, size: int) -> Tensor:
    """Mask [H, W] (bool) -> bool [size, size], the nearest pixels."""
    small = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(small, bool))


class ImageDataset(Dataset):
    """Samples as tensors: {"image" [3, S, S], "mask" bool [S, S], "label", "index", "notes"}.

    A file that cannot be read becomes {"error": exception}: raised here, it would have a worker's traceback.
    """

    def __init__(
        self, samples: Sequence[Sample], image_size: int, resampling: str, roi: RegionOfInterest | None = None
    ) -> None:
        self.samples = list(samples)
        self.roi = roi
        self.image_size = image_size
        self.resampling = resampling

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        try:
            picture, notes = sample.read(), 0
            mask = torch.zeros(self.image_size, self.image_size, dtype=torch.bool)
            if sample.masks:
                marked, notes = sample.read_mask(picture.size)
                mask = mask_to_tensor(marked, self.image_size)
        except (InputError, OSError) as error:
            return {"error": error}
        image = self.roi.apply(picture.image) if self.roi else picture.image
        return {
            "image": to_tensor(image, self.image_size, self.resampling),
            "mask": mask,
            "label": sample.label,
            "index": index,
            "notes": int(picture.notes | notes),
        }


class ImageLoader:
    """Batches of this process's share of an ImageDataset, in order; raises UnreadableError or OSError for a file."""

    def __init__(
        self, dataset: ImageDataset, batch_size: int, workers: int, description: str, pin_memory: bool = False
    ) -> None:
        self.dataset = dataset
        self.description = description
        self.meanwhile: Callable[[], Any] | None = None  # what a pass does while the workers read the first batch
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
        samples, notes, error = self.dataset.samples, Notes(), None
        with tqdm(total=len(self.shard), desc=self.description, unit="image", leave=False, disable=None) as progress:
            batches = self._batches()
            for batch in stoppable(batches):
                distributed.check()
                if error := batch.get("error"):
                    break
                for index, found in zip(batch["index"].tolist(), batch["notes"].tolist(), strict=True):
                    notes.add(found, samples[index].path, *samples[index].masks[:1])
                yield batch
                progress.update(len(batch["label"]))
        if error:
            del batches  # the workers end: in the error's traceback they would live on
            raise error
        notes.say()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """For `stoppable`: a signal while the workers begin would leave an iterator that is half made."""
        batches = iter(self.loader)  # the workers begin
        if self.meanwhile:
            self.meanwhile()
        yield from batches


def find_unreadable(samples: Sequence[Sample], workers: int) -> dict[str, str]:
    """Read every image and mask; returns the names of the samples that cannot be read, with the reason."""
    loader = DataLoader(ImageDataset(samples, 1, "bilinear"), None, num_workers=workers, worker_init_fn=_end_silently)
    loaded = tqdm(stoppable(loader), total=len(samples), desc="checking files", unit="image", leave=False, disable=None)
    return {sample.name: str(found["error"]) for sample, found in zip(samples, loaded, strict=True) if "error" in found}


def leave_out_unreadable(category: Category, samples: Sequence[Sample], workers: int) -> None:
    """Remove samples that cannot be read from the category, and warn how many there are."""
    own = distributed.shard(len(samples), 1)
    for part in distributed.gathered(find_unreadable(samples[own.start : own.stop], workers)):
        category.left_out |= part
    if category.left_out:
        warn(f"{category.name}: {len(category.left_out)} of {len(samples)} images cannot be read and are left out")


@contextlib.contextmanager
def list_all_unreadable(
    categories: Sequence[Category], samples_of: Callable[[Category], Sequence[Sample]], workers: int, skipped: bool
) -> Iterator[None]:
    """If a broken image ends the run, read all others, too, and raise an InputError that lists every broken one."""
    try:
        yield
    except UnreadableError as error:
        found = [find_unreadable(samples_of(category), workers) for category in categories]
        broken = [reason for part in found for reason in part.values()]
        remedy = "" if skipped else ", or leave out what cannot be read with --skip-unreadable"
        if len(broken) < 2:
            raise InputError(f"{error}{remedy}") from None
        message = f"{len(broken)} images, listed above, cannot be read; do what is said of each{remedy}"
        raise InputError(message, broken) from None


def _end_silently(worker: int) -> None:
    """A worker leaves signals to the script, and its thread that sends tensors stays silent if the script ends."""
    leave_signals_to_parent()
    lost = ConnectionError | EOFError
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, lost) else sys.__excepthook__(kind, *rest)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    broken = (sample for sample in samples if "error" in sample)
    return next(broken, None) or default_collate(samples)
