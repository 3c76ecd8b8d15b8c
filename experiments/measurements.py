"""Scores and patch scores of the branches on the test images, kept on disk: one network pass serves every cell."""

import functools
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.loading import ImageDataset, mask_to_tensor
from datasets.mvtec import Category, Sample
from datasets.region import RegionOfInterest
from evaluation.results import Results
from experiments.table import Unavailable, digest
from experiments.variants import Variant
from models.branches import weights_flag
from models.branches.branch import Branch
from models.branches.part import Part
from models.branches.postprocess import resize_images
from models.networks.backbones import build_backbone
from training.settings import RunSettings
from training.training import fit_branch, make_loader
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import InputError, UnreadableError
from utils.files import digest_of_lines, sha256_of_file


class Measured(NamedTuple):
    """A branch's scores [N] (float64) and patch values [N, h, w] (float32), and its held-out statistics, if any."""

    scores: Tensor
    patches: Tensor
    calibration: dict[str, float] | None


class Measurements:
    """Measures variants on a category's test images, or finds earlier measurements in `folder`.

    Three branches take about 10 KB an image. Branches fitted for it lie in `folder`/fitted until `tidy`.
    """

    def __init__(self, folder: Path, category: Category, run: RunSettings, weights: dict[str, str | None]) -> None:
        self.folder, self.category, self.run, self.weights = folder, category, run, weights
        self.samples = category.test_samples()
        self.images_digest = digest_of_files(self.samples)

    @functools.cached_property
    def training_digest(self) -> str:
        return digest_of_files(self.category.train_samples())

    def needs(self, variant: Variant, input_size: int) -> dict[str, Any]:
        """What a measurement depends on, as JSON values."""
        return {
            "branch": variant.checkpoint_digest or self._fit_key(variant),
            "images": self.images_digest,
            "input_size": input_size,
            "max_megapixels": self.category.decoding.max_megapixels,
            "precision": self.run.precision,
            "device": torch.device(self.run.device).type,
        }

    def of(self, variant: Variant, input_size: int) -> Measured:
        """The variant's measurement on images loaded at `input_size`; raises Unavailable if it cannot be fitted."""
        path = self.folder / f"{digest(self.needs(variant, input_size))}.safetensors"
        try:
            tensors, metadata = load_checkpoint(path)
            return Measured(tensors["scores"], tensors["patches"], metadata["calibration"])
        except (InputError, KeyError):  # not there yet, or damaged
            path.unlink(missing_ok=True)
        branch = self._fitted(variant)
        dataset = ImageDataset(self.samples, input_size, "bicubic", branch.roi)
        found = []
        for batch in make_loader(self.run, dataset, f"{branch.name} measure", branch.device):
            images = resize_images(batch["image"].to(branch.device, non_blocking=True), branch.image_size)
            scores, patches = branch.patch_scores(branch.extract(images))
            found.append((scores.double().cpu(), patches.float().cpu()))
        measured = Measured(*(torch.cat(part) for part in zip(*found, strict=True)), branch.calibration)
        tensors = {"scores": measured.scores, "patches": measured.patches}
        save_checkpoint(path, tensors, {"branch": branch.name, "calibration": branch.calibration})
        return measured

    def _fitted(self, variant: Variant) -> Branch:
        """The branch, from its checkpoint, or fitted once in this grid."""
        run, weights, flag = self.run, self.weights.get(variant.branch.name), weights_flag(variant.branch.name)
        path = variant.checkpoint or self.folder / "fitted" / f"{self._fit_key(variant)}.safetensors"
        if path.is_file():
            branch = variant.branch.load(path, weights, run.device, run.precision)
            if variant.checkpoint and sha256_of_file(path) != variant.checkpoint_digest:
                raise InputError(f"{path} has just been changed by another run; start this one again")
            return branch
        try:
            backbone = build_backbone(variant.network, run.device, weights, run.precision, flag)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # too few images for the covariance: the first training has warned
                branch = fit_branch(run, self.category, variant.split, variant.built(backbone))
        except UnreadableError:
            raise
        except InputError as error:
            raise Unavailable(str(error)) from None
        branch.save(path)
        return branch

    def _fit_key(self, variant: Variant) -> str:
        limit = self.category.decoding.max_megapixels
        return digest([variant.fit_needs(), self.training_digest, limit, self.run.device, self.run.precision])

    def figures(self, found: Iterable[Part], roi: RegionOfInterest | None = None) -> dict[str, Any]:
        """Every figure of metrics.json for batches in the order of the test images."""
        results, start = Results(self.samples, ["all"], roi=roi), 0
        labels = torch.tensor([sample.label for sample in self.samples])
        for part in found:
            rows = slice(start, start + len(part.scores))
            batch = {"mask": self._masks(part.maps.shape[-1])[rows], "label": labels[rows]}
            results.add({"all": part}, {**batch, "index": torch.arange(rows.start, rows.stop)})
            start = rows.stop
        return results.metrics()["all"]

    @functools.lru_cache(maxsize=1)  # noqa: B019  there is one of these for each category
    def _masks(self, size: int) -> Tensor:
        """The masks [N, size, size] of all test images; the pixel metrics hold four times as much."""
        masks = [sample.read_mask()[0] if sample.masks else np.zeros((1, 1), bool) for sample in self.samples]
        return torch.stack([mask_to_tensor(mask, size) for mask in masks])

    def tidy(self) -> None:
        """Remove the fitted branches, once everything has been measured, and what a killed run left."""
        shutil.rmtree(self.folder / "fitted", ignore_errors=True)
        for leftover in self.folder.glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)


def digest_of_files(samples: Sequence[Sample]) -> str:
    """A digest of images and masks: their names, labels and bytes."""
    lines = []
    for sample in samples:
        files = [sha256_of_file(path) for path in (sample.path, *sample.masks)]
        lines.append(f"{sample.name} {sample.label} {' '.join(files)}")
    return digest_of_lines(lines)
