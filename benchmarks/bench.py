"""What the stages share: untrained networks, branches fitted on noise, images, and how things are timed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import reference
from datasets.loading import to_tensor
from datasets.mvtec import Category
from models import BRANCHES, USAD
from models.branches.branch import Branch
from models.networks import libraries
from models.networks.backbones import Backbone, build_backbone
from models.networks.kernels import linear
from models.networks.spec import HALF, BackboneSpec
from models.networks.weights import random_state_dict
from scenes.scenes import draw_scene
from utils.processes import run_python

SEED = 22
PAPER = {
    "ma_clu": ("vit_small_patch14_dinov2", 350),
    "ma2patch": ("vit_base_patch14_dinov2", 406),
    "pc": ("wide_resnet50_2", 238),
}
SMALL = {"ma_clu": ("test_vit", 64), "ma2patch": ("test_vit", 96), "pc": ("resnet18", 64)}
LIKE = {"tokens": "ma_clu", "maps": "pc"}  # whose network a branch from outside gets


class Row(NamedTuple):
    """One size of one stage: seconds, ours and the reference's (None where it was not run), and a remark."""

    stage: str
    size: str
    ours: float
    reference: float | None
    remark: str  # what the reference is, and how near the two results are

    @property
    def ratio(self) -> float | None:
        """How many times as long the reference takes."""
        return self.reference / self.ours if self.reference else None


@dataclasses.dataclass(eq=False)
class Bench:
    """A device and what runs on it."""

    device: str
    precision: str  # of our side
    quick: bool  # small networks and sizes
    work: Path  # weights, checkpoints and drawn images
    category: Path | None = None  # images in MVTec layout; None: drawn
    anomalib_python: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def batch_size(self) -> int:
        return 32 if self.cuda else 4

    def network(self, branch: type[Branch]) -> tuple[str, int]:
        """Name and input size of the branch's network."""
        table = SMALL if self.quick else PAPER
        return table.get(branch.name, table[LIKE[branch.backbone_kind]])

    def spec(self, branch: type[Branch]) -> BackboneSpec:
        """Its untrained network. The weights lie in a file, as a run with pretrained ones has them."""
        name, size = self.network(branch)
        file = self.work / f"{name}.safetensors"
        if not file.exists():
            save_file(random_state_dict(lambda: libraries.full_network(name), SEED), file)
        return BackboneSpec(branch.backbone_kind, name, size).with_weights(str(file))

    def backbone(self, branch: type[Branch], precision: str | None = None) -> Backbone:
        return build_backbone(self.spec(branch), self.device, precision=precision or self.precision)

    @functools.cached_property
    def branches(self) -> list[Branch]:
        """All branches, fitted on noise in float32."""
        fitted = []
        for kind in BRANCHES.values():
            shrinks = "covariance" in inspect.signature(kind).parameters  # 16 images have no empirical one
            fitted.append(kind(self.backbone(kind, "fp32"), **({"covariance": "ledoit-wolf"} if shrinks else {})))
            fitted[-1].fit(Noise(16, fitted[-1].image_size))
        return fitted

    def checkpoints(self, category: str) -> Path:
        """The folder in which the branches' checkpoints for the category now lie."""
        folder = self.work / "models" / category
        for branch in self.branches:
            branch.save(folder / f"{branch.name}.safetensors")
        return folder

    @functools.cache  # noqa: B019  there is one Bench
    def usad(self, precision: str) -> USAD:
        """The fusion at this precision, of the same branches at each."""
        return USAD.load(self.checkpoints("belt"), self.device, precision, fusion="paper")

    def published_loop(self) -> reference.PublishedLoop | None:
        """The same branches in the published way, which has three."""
        if set(BRANCHES) != reference.BRANCHES:
            return None
        return reference.PublishedLoop.load(self.checkpoints("belt"), self.device)

    @functools.cache  # noqa: B019
    def gflop(self, branch: type[Branch]) -> float:
        """10^9 operations for an image by the branch's network, cut after its last layer in use.

        Multiplications and additions count apart.
        """
        name, size = self.network(branch)
        net = libraries.cnn(name, (8, 16), size) if branch.backbone_kind == "maps" else libraries.vit(name, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.to_empty(device="meta").eval()(torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops() / 1e9

    @functools.cache  # noqa: B019
    def product_rates(self, precision: str) -> dict[str, float]:
        """GFLOP/s of square matrix products, by kernel: torch's own, and the one that the project takes in float32."""
        side = 512 if self.quick else 8192 if self.cuda else 4096
        dtype = HALF.get(precision, torch.float32)
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        kernels = {"torch.mm": lambda: a @ b}
        if dtype == torch.float32:
            kernels["models.networks.kernels.linear"] = lambda: linear(a, b)
        return {name: 2 * side**3 / self.seconds(kernel) / 1e9 for name, kernel in kernels.items()}

    def pictures(self, count: int, size: int) -> Iterator[Tensor]:
        """`count` training images [3, size, size], of the category (from the first again) or drawn."""
        samples = Category(self.category.parent, self.category.name).train_samples() if self.category else []
        for number in range(count):
            if samples:
                image = Image.open(samples[number % len(samples)].path).convert("RGB")
            else:
                image = Image.fromarray(np.ascontiguousarray(draw_scene((SEED, number), size)[0][..., ::-1]))
            yield to_tensor(image, size, "bilinear")

    def drawn_category(self, name: str, size: int, images: int) -> Path:
        """40 training and `images` test images of drawn scenes, half of these with a foreign object."""
        counts = ["--train", 40, "--good", images // 2, "--anomalous", images - images // 2]
        folder = self.work / "data" / name
        run_python(["make_demo_data.py", "--data-root", folder.parent, "--category", name, "--size", size, *counts])
        return folder

    def seconds(self, work: Callable[[], Any], least: float = 0.3) -> float:
        """Seconds of one call: the best of three rounds, each of calls enough to take `least` seconds."""
        for _ in range(3):  # the third replays a captured pass
            work()
        calls = 1 if self.quick else max(1, min(50, round(least / self.round(work))))
        return min(self.round(work, calls) for _ in range(3))

    def round(self, work: Callable[[], Any], calls: int = 1) -> float:
        """Seconds of one of so many calls; the GPU is waited for before and after."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def pair(self, ours: Callable[[], Any], plain: Callable[[], Any] | None, rounds: int = 3) -> tuple[Any, ...]:
        """Both timed in turn after a warm-up: (seconds, seconds or None, result, result or None), medians."""
        sides = [work for work in (ours, plain) if work is not None]
        results = [work() for work in sides]
        times = [[self.round(work) for work in sides] for _ in range(rounds)]
        nothing = [None] * (2 - len(sides))
        return (*map(statistics.median, zip(*times, strict=True)), *nothing, *results, *nothing)


class Noise:
    """A loader of `count` square images of noise, made as they are read, 8 at a time."""

    def __init__(self, count: int, size: int) -> None:
        self.dataset, self.size = range(count), size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in torch.arange(len(self.dataset)).split(8):
            yield {"image": noise(len(index), self.size, int(index[0])), "index": index}


def noise(count: int, size: int, seed: int, device: str = "cpu", spot: float = 0.0) -> Tensor:
    """Noise [count, 3, size, size] at three scales, like a frame's, each with a spot of more noise, up to `spot`."""
    generator = torch.Generator(device).manual_seed(seed)
    total = torch.zeros(count, 3, size, size, device=device)
    for step in (1, 8, 64):
        coarse = torch.randn(count, 3, -(-size // step), -(-size // step), generator=generator, device=device)
        total += torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False) / 2
    side = size // 3
    for image in total if spot else ():
        x, y = torch.randint(0, size - side, (2,), generator=generator, device=device).tolist()
        image[:, y : y + side, x : x + side] *= 1 + spot * torch.rand(1, generator=generator, device=device)
    return total


def difference(ours: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    expected = expected.to(ours.device)
    return float((ours - expected).abs().max() / expected.abs().max())
