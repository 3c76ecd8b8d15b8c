"""What the flags say, and the untrained networks, fitted branches and images that follow from it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.measure import gflop, product_rate
from datasets.loading import to_tensor
from datasets.mvtec import Category
from models import BRANCHES
from models.branches.branch import Branch
from models.networks import libraries
from models.networks.backbones import Backbone, BackboneSpec, build_backbone
from scenes.scenes import draw_scene

SEED = 22
# Network and input size by branch; a branch that is not named here gets those of its kind.
PAPER = {
    "ma_clu": ("vit_small_patch14_dinov2", 350),
    "ma2patch": ("vit_base_patch14_dinov2", 406),
    "pc": ("wide_resnet50_2", 238),
    "tokens": ("vit_small_patch14_dinov2", 350),
    "maps": ("wide_resnet50_2", 238),
}
SMALL = {
    "ma_clu": ("test_vit", 64),
    "ma2patch": ("test_vit", 96),
    "pc": ("resnet18", 64),
    "tokens": ("test_vit", 64),
    "maps": ("resnet18", 64),
}


@dataclasses.dataclass(eq=False)
class Settings:
    """What the flags say."""

    device: str
    precision: str
    batch_size: int
    quick: bool
    work: Path  # drawn images and checkpoints, kept for the next run
    category: Path | None = None  # images in MVTec layout; None: drawn
    anomalib_python: Path | None = None

    def network(self, branch: type[Branch]) -> tuple[str, int]:
        """Name and input size of the branch's network."""
        table = SMALL if self.quick else PAPER
        return table.get(branch.name, table[branch.backbone_kind])

    def backbone(self, branch: type[Branch]) -> Backbone:
        """The untrained network as the branch uses it."""
        name, size = self.network(branch)
        spec = BackboneSpec(branch.backbone_kind, name, size, weights="random", seed=SEED)
        return build_backbone(spec, self.device, precision=self.precision)

    def plain_network(self, branch: type[Branch]) -> nn.Module:
        """The same network whole and in fp32, with the same values."""
        name, size = self.network(branch)
        if branch.backbone_kind == "maps":
            return reference.untrained_resnet(name, SEED).to(self.device)
        return reference.untrained_vit(name, size, SEED).to(self.device)

    @functools.cached_property
    def branches(self) -> dict[str, Branch]:
        """All branches by name, fitted on noise."""
        fitted = {}
        for kind in BRANCHES.values():
            branch = kind(self.backbone(kind))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fewer images than channels
                branch.fit(Noise(16, branch.image_size))
            fitted[kind.name] = branch
        return fitted

    @functools.cache  # noqa: B019  there is one Settings
    def gflop(self, branch: type[Branch]) -> float:
        """10^9 operations for an image by the branch's network, cut after its last layer in use."""
        name, size = self.network(branch)
        net = libraries.cnn(name, (8, 16)) if branch.backbone_kind == "maps" else libraries.vit(name, size)
        return gflop(net.to_empty(device="meta").eval(), torch.empty(1, 3, size, size, device="meta"))

    @functools.cached_property
    def rates(self) -> dict[str, float]:
        """GFLOP/s of matrix products at this precision, by kernel, measured once."""
        return product_rate(self.device, self.precision, 512 if self.quick else 4096)

    def pictures(self, count: int, size: int) -> Iterator[Tensor]:
        """`count` training images [3, size, size], of the category (from the first again) or drawn."""
        samples = Category(self.category.parent, self.category.name).train_samples() if self.category else []
        for number in range(count):
            if samples:
                image = Image.open(samples[number % len(samples)].path).convert("RGB")
            else:
                image = Image.fromarray(np.ascontiguousarray(draw_scene((SEED, number), size)[0][..., ::-1]))
            yield to_tensor(image, size, "bilinear")


def noise(count: int, size: int, seed: int = SEED) -> Tensor:
    """Images [count, 3, size, size] of noise."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Noise:
    """A loader of `images` square images of noise, made as they are read, 8 at a time."""

    def __init__(self, images: int, size: int) -> None:
        self.dataset, self.size = range(images), size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in torch.arange(len(self.dataset)).split(8):
            yield {"image": noise(len(index), self.size, int(index[0])), "index": index}
