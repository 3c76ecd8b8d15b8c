"""What the flags say, and the networks that follow from it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import gflop, product_rate
from models import BRANCHES
from models.branches.branch import Branch
from models.networks import libraries
from models.networks.backbones import BackboneSpec, build_backbone

SEED = 22
PAPER = {
    "ma_clu": ("vit_small_patch14_dinov2", 350),
    "ma2patch": ("vit_base_patch14_dinov2", 406),
    "pc": ("wide_resnet50_2", 238),
}
SMALL = {"ma_clu": ("test_vit", 64), "ma2patch": ("test_vit", 96), "pc": ("resnet18", 64)}


@dataclasses.dataclass(eq=False)
class Settings:
    """What the flags say."""

    device: str
    precision: str
    batch_size: int
    quick: bool
    images: Path | None  # a folder of real images, or None for drawn ones alone
    reference_images: int  # the published loop is timed on so many images at most
    work: Path
    category: Path | None = None  # a category in MVTec layout, for the stages that run whole scripts
    anomalib_python: Path | None = None

    @property
    def networks(self) -> dict[str, tuple[str, int]]:
        return SMALL if self.quick else PAPER

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        """GFLOP/s of matrix products at this precision, by kernel, measured once."""
        return product_rate(self.device, self.precision, 512 if self.quick else 4096)

    @property
    def rate(self) -> float:
        """GFLOP/s of the fastest of them."""
        return max(self.rates.values())

    @functools.cached_property
    def branches(self) -> dict[str, Branch]:
        """The three branches, untrained networks, fitted on noise."""
        fitted = {}
        for kind in BRANCHES.values():
            name, size = self.networks[kind.name]
            spec = BackboneSpec(kind.backbone_kind, name, size, weights="random", seed=SEED)
            branch = kind(build_backbone(spec, self.device, precision=self.precision))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fewer images than channels
                branch.fit(Noise(16, size))
            fitted[kind.name] = branch
        return fitted

    @functools.cache  # noqa: B019  there is one Settings
    def gflop(self, branch: str) -> float:
        """10^9 operations that the branch's network, cut after its last layer in use, needs for an image."""
        name, size = self.networks[branch]
        net = libraries.cnn(name, (8, 16)) if branch == "pc" else libraries.vit(name, size)
        return gflop(net.to_empty(device="meta").eval(), torch.empty(1, 3, size, size, device="meta"))


class Noise:
    """A loader of `images` square images of noise, made as they are read, 8 at a time."""

    def __init__(self, images: int, size: int) -> None:
        self.dataset, self.size = range(images), size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(SEED)
        for index in torch.arange(len(self.dataset)).split(8):
            images = torch.randn(len(index), 3, self.size, self.size, generator=generator)
            yield {"image": images, "index": index}
