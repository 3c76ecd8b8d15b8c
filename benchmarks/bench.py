"""What the benchmarks share: untrained networks, branches fitted on noise, and how things are timed."""

import functools
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from models import BRANCHES, USAD
from models.branches import METHOD
from models.branches.branch import Branch
from models.networks import libraries
from models.networks.backbones import Backbone, build_backbone
from models.networks.kernels import linear
from models.networks.spec import HALF, BackboneSpec
from models.networks.weights import random_state_dict

SEED = 22
SMALL = {"ma_clu": ("test_vit", 64), "ma2patch": ("test_vit", 96), "pc": ("resnet18", 64)}
LEAST = 0.3  # seconds that a round takes, of at most 50 calls
LIKE = {"tokens": "ma_clu", "maps": "pc"}  # whose network a branch from outside gets


class Pair(NamedTuple):
    """Seconds of a call of ours and of the plain one's (None where it was not run), and what the last calls gave."""

    ours: float
    plain: float | None
    found: Any
    expected: Any
    memory: float | None  # peak of ours on the GPU, MB


class Bench:
    """A device and what runs on it; `quick` means small networks and sizes. Checkpoints lie below `out`."""

    def __init__(self, device: str, precision: str, quick: bool, out: Path) -> None:
        self.device, self.precision, self.quick = device, precision, quick
        self.cuda = device.startswith("cuda")
        self.batch_size = 32 if self.cuda else 4
        self.work = out.absolute() / "work" / ("quick" if quick else "full")  # files of the one are not the other's
        self.work.mkdir(parents=True, exist_ok=True)

    @functools.cache  # noqa: B019  there is one Bench
    def spec(self, branch: type[Branch]) -> BackboneSpec:
        """Its untrained network, whose weights come from a file: to load them costs what it costs a user."""
        table = SMALL if self.quick else METHOD
        name, size = table.get(branch.name, table[LIKE[branch.backbone_kind]])
        file = self.work / f"{name}.safetensors"
        save_file(random_state_dict(lambda: libraries.full_network(name), SEED), file)
        return BackboneSpec(branch.backbone_kind, name, size).with_weights(str(file))

    def backbone(self, branch: type[Branch], precision: str | None = None) -> Backbone:
        return build_backbone(self.spec(branch), self.device, precision=precision or self.precision)

    @functools.cached_property
    def checkpoints(self) -> Path:
        """The folder with the checkpoints of all branches, fitted on noise in float32."""
        folder = self.work / "models" / "belt"
        for kind in BRANCHES.values():
            shrinks = "covariance" in inspect.signature(kind).parameters  # 16 images have no empirical one
            branch = kind(self.backbone(kind, "fp32"), **({"covariance": "ledoit-wolf"} if shrinks else {}))
            images = [{"image": noise(1, branch.image_size, seed)[0], "index": seed} for seed in range(16)]
            branch.fit(DataLoader(images, batch_size=8))
            branch.save(folder / f"{branch.name}.safetensors")
        return folder

    @functools.cache  # noqa: B019
    def usad(self, precision: str) -> USAD:
        """The fusion at this precision, of the same branches at each."""
        return USAD.load(self.checkpoints, self.device, precision, fusion="paper")

    @functools.cache  # noqa: B019
    def gflop(self, branch: type[Branch]) -> float:
        """10^9 operations, additions too, for an image by the branch's network, cut after its last layer in use."""
        name, size = self.spec(branch).name, self.spec(branch).image_size
        net = libraries.cnn(name, (8, 16), size) if branch.backbone_kind == "maps" else libraries.vit(name, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.to_empty(device="meta").eval()(torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops() / 1e9

    @functools.cache  # noqa: B019
    def product_rate(self, precision: str) -> float:
        """GFLOP/s of square matrix products, by the faster of torch's kernel and the project's."""
        side = 512 if self.quick else 8192 if self.cuda else 4096
        dtype = HALF.get(precision, torch.float32)
        a, b = (torch.randn(side, side, device=self.device, dtype=dtype) for _ in range(2))
        kernels = [lambda: a @ b, lambda: linear(a, b)] if dtype == torch.float32 else [lambda: a @ b]
        return 2 * side**3 / min(self.pair(kernel).ours for kernel in kernels) / 1e9

    def pair(self, ours: Callable[[], Any], plain: Callable[[], Any] | None = None) -> Pair:
        """Both timed in turn after a warm-up, in three rounds; the GPU is waited for before and after each."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        found = [ours() for _ in range(3)][-1]  # the third replays a captured pass
        memory = torch.cuda.max_memory_allocated() / 1e6 if self.cuda else None
        expected = plain() if plain else None
        works = [ours, plain] if plain else [ours]
        calls = [1 if self.quick else max(1, min(50, round(LEAST / self.round(work)))) for work in works]
        rounds = [[self.round(*side) for side in zip(works, calls, strict=True)] for _ in range(3)]
        took, plain_took, *_ = *map(statistics.median, zip(*rounds, strict=True)), None
        return Pair(took, plain_took, found, expected, memory)

    def round(self, work: Callable[[], Any], calls: int = 1) -> float:
        """Seconds of one of so many calls."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - start) / calls

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


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
