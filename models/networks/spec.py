"""What decides what a backbone computes: the network, its input, its weights, its precision."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from datasets.loading import IMAGENET_MEAN, IMAGENET_STD
from models.networks import MAX_SIDE, PRECISIONS
from utils.errors import require_known

SOURCES = ("pretrained", "demo", "imagenet", "random")  # of weights that are not a file
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """Stored in checkpoints; `build_backbone` fills in `fingerprint` and `precision`."""

    kind: str  # "tokens" or "maps"
    name: str
    image_size: int
    position_size: int | None = None  # None: the image size
    weights: str = "pretrained"  # or another of SOURCES, or "file"
    file: str | None = None  # its path
    seed: int = 22
    precision: str = "auto"
    mean: tuple[float, float, float] = IMAGENET_MEAN  # by which the network wants colours of 0 to 1 normalised
    std: tuple[float, float, float] = IMAGENET_STD
    fingerprint: str | None = None
    normalize_contrast: bool = False  # instead bring each image to the same mean colour and contrast

    def with_weights(self, weights: str) -> BackboneSpec:
        """This network with the weights that a flag names: one of SOURCES, or a file's path."""
        if weights in SOURCES:
            return dataclasses.replace(self, weights=weights, file=None)
        return dataclasses.replace(self, weights="file", file=weights)

    @property
    def source(self) -> str:
        """Where the weights come from, for messages."""
        return {"file": str(self.file), "random": f"random (seed {self.seed})"}.get(self.weights, self.weights)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BackboneSpec:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        given = {"mean": tuple(values["mean"]), "std": tuple(values["std"]), "weights": values["weights"]}
        spec = cls(**values | given)  # no default for the weights: the default would download
        if not len(spec.mean) == len(spec.std) == 3:
            raise ValueError("other than three colours")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*spec.mean, *spec.std)):
            raise ValueError("means or deviations of colours that are no numbers")
        sides = [spec.image_size] if spec.position_size is None else [spec.image_size, spec.position_size]
        if not (isinstance(spec.name, str) and all(type(side) is int and 0 < side <= MAX_SIDE for side in sides)):
            raise ValueError("a network's name, image size or position size that cannot be")
        if type(spec.seed) is not int or not 0 <= spec.seed < 2**32 or spec.kind not in ("tokens", "maps"):
            raise ValueError("a seed or a kind of features that cannot be")
        return spec


def resolve_precision(recorded: str, asked: str, device: str) -> str:
    """The precision to use; "auto" is fp32 on a CPU, elsewhere the recorded one or the best that the device has.

    Raises InputError for another than PRECISIONS.
    """
    require_known("precision", [asked], PRECISIONS)
    if asked != "auto":
        return asked
    if torch.device(device).type != "cuda":
        return "fp32"
    if recorded != "auto":
        return recorded
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
