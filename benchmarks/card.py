"""A card under test: the paper's networks and branches on it, drawn frames, and how long work takes there."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import BRANCHES, MACLU, USAD, MA2Patch, PatchCore
from models.networks import libraries
from models.networks.backbones import Backbone, build_backbone
from models.networks.spec import BackboneSpec
from models.networks.weights import random_state_dict

SEED = 22
PAPER = {
    "ma_clu": ("vit_small_patch14_dinov2", 350),
    "ma2patch": ("vit_base_patch14_dinov2", 406),
    "pc": ("wide_resnet50_2", 238),
}
SMALL = {"ma_clu": ("test_vit", 64), "ma2patch": ("test_vit", 96), "pc": ("resnet18", 64)}


class Bench:
    """The flags, what is measured again and again, and what was found."""

    def __init__(self, args: argparse.Namespace, started: float) -> None:
        self.args, self.started = args, started
        self.device = torch.device(args.device)
        self.networks = SMALL if args.quick else PAPER
        self.cuda = self.device.type == "cuda"
        self.found: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.states: dict[str, dict[str, Tensor]] = {}
        self.models: dict[str, USAD] = {}

    def say(self, **figures: Any) -> None:
        """Keep and print figures."""
        self.found |= figures
        for name, figure in figures.items():
            text = f"{figure:.4g}" if isinstance(figure, float) else figure
            print(f"[{time.perf_counter() - self.started:6.1f} s] {name}: {text}", flush=True)

    def seconds(self, work: Callable[[], Any], least: float = 0.3) -> float:
        """Seconds of one call: the best of three rounds, each of calls enough to take `least` seconds."""
        for _ in range(3):  # the third replays a captured pass
            work()
        once = self.round(work, 1)
        calls = 1 if self.args.quick else max(1, min(50, round(least / once)))
        return min(self.round(work, calls) for _ in range(3))

    def round(self, work: Callable[[], Any], calls: int) -> float:
        """Seconds of one of so many calls."""
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self.wait()
        return (time.perf_counter() - start) / calls

    def peak(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Seconds of a call, and the device's peak memory in MB with all that lies there already."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        took = self.seconds(work)
        return took, torch.cuda.max_memory_allocated() / 1e6 if self.cuda else 0.0

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def state(self, network: str) -> dict[str, Tensor]:
        """The untrained weights of a network, also in a file: a run with pretrained ones reads them from files."""
        if network not in self.states:
            self.states[network] = random_state_dict(lambda: libraries.full_network(network), SEED)
            save_file(self.states[network], self.args.out.absolute() / f"{network}.safetensors")
        return self.states[network]

    def usad(self, precision: str) -> USAD:
        """The fusion of three branches at this precision; fitted once, in float32, so that only precision differs."""
        folder = self.args.out.absolute() / "program" / "models" / "belt"
        if precision in self.models:
            return self.models[precision]
        if precision == "fp32":
            branches = [
                MACLU(self.backbone("ma_clu", precision), covariance="ledoit-wolf"),  # 16 images have no other
                MA2Patch(self.backbone("ma2patch", precision), covariance="ledoit-wolf"),
                PatchCore(self.backbone("pc", precision)),
            ]
            for branch in branches:
                branch.fit(Frames(16, branch.image_size))
                branch.save(folder / f"{branch.name}.safetensors")
            self.models[precision] = USAD(branches)
        else:
            self.usad("fp32")
            self.models[precision] = USAD.load(folder, str(self.device), precision, fusion="paper")
        return self.models[precision]

    def backbone(self, name: str, precision: str, device: str | None = None) -> Backbone:
        network, size = self.networks[name]
        self.state(network)
        file = str(self.args.out.absolute() / f"{network}.safetensors")
        spec = BackboneSpec(BRANCHES[name].backbone_kind, network, size).with_weights(file)
        return build_backbone(spec, device or str(self.device), precision=precision)

    def images(self, count: int, size: int) -> Tensor:
        return frames(count, size, SEED + 1).to(self.device)

    def gflop(self, name: str) -> float:
        """10^9 operations of the network, cut after its last layer in use, for an image."""
        network, size = self.networks[name]
        net = libraries.cnn(network, (8, 16)) if name == "pc" else libraries.vit(network, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.to_empty(device="meta").eval()(torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops() / 1e9

    def rate(self, model: str, size: int, batch: int, seconds: float, gflop: float, peak: float) -> None:
        """A row of the table, in the columns of timm's benchmark files and two more."""
        tflops = gflop * batch / seconds / 1e3
        row = {
            "model": model,
            "size": size,
            "precision": "bf16",
            "batch": batch,
            "images_per_second": round(batch / seconds, 1),
            "ms_per_image": round(1e3 * seconds / batch, 4),
            "tflops": round(tflops, 1),
            "share_of_product_rate": round(tflops / self.found["product_tflops_bf16"], 4),
            "peak_memory_mb": round(peak, 1),
        }
        self.rows.append(row)
        self.say(**{f"{model}, batch {batch}": json.dumps(row)})


class Frames:
    """A loader of drawn noise, made as it is read, 8 images at a time."""

    def __init__(self, count: int, size: int) -> None:
        self.dataset, self.size = range(count), size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in torch.arange(len(self.dataset)).split(8):
            yield {"image": frames(len(index), self.size, int(index[0])), "index": index}


def frames(count: int, size: int, seed: int, device: torch.device | str = "cpu", spot: float = 0.0) -> Tensor:
    """Noise [count, 3, size, size] at three scales, like a frame's, each with a spot of more noise, up to `spot`."""
    generator = torch.Generator(device).manual_seed(seed)
    total = torch.zeros(count, 3, size, size, device=device)
    for step in (1, 8, 64):
        noise = torch.randn(count, 3, -(-size // step), -(-size // step), generator=generator, device=device)
        total += torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False) / 2
    side = size // 3
    for image in total if spot else ():
        x, y = torch.randint(0, size - side, (2,), generator=generator, device=device).tolist()
        image[:, y : y + side, x : x + side] *= 1 + spot * torch.rand(1, generator=generator, device=device)
    return total
