"""USAD: branches that look at the same frame, and the rule that fuses their parts."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.loading import to_tensor
from models.branches import BRANCHES
from models.branches.branch import Branch
from models.branches.part import Part
from models.branches.postprocess import resize_images
from models.fusion import RULES
from models.fusion.checkpoints import checkpoint_digests, checkpoint_paths, default_fusion
from models.fusion.operating_point import FILE_NAME, OperatingPoint
from models.fusion.prediction import Model
from utils.errors import InputError, require_known
from utils.gpu import CapturedPasses, side_by_side
from utils.timing import Stopwatch


class USAD(Model):
    """Fuses any branches; it knows only their names, scores and maps.

    `fusion` names the rule, `settings` are its own. Raises InputError if there is no branch, two have one name, or they
    lack something that the rule needs.
    """

    name = "fusion"

    def __init__(self, branches: Sequence[Branch], fusion: str = "paper", **settings: Any) -> None:
        require_known("fusion", [fusion], RULES)
        if not branches:
            raise InputError("a fusion needs at least one branch")
        self.branches = list(branches)
        for name, count in Counter(self.parts()).items():
            if count > 1:
                raise InputError(f"'{name}' is the name of {count} of {', '.join(self.parts())}; each needs its own")
        self.image_size = max(branch.image_size for branch in branches)
        self.device = branches[0].device
        self.tiles = max(branch.tiles for branch in branches)  # along each side of a frame, at most
        self.batch_size = max(1, (32 if self.device.type == "cuda" else 4) // self.tiles**2)
        self.roi, self.bit_depth = branches[0].roi, branches[0].bit_depth
        for name in ("roi", "bit_depth"):
            if any(getattr(branch, name) != getattr(self, name) for branch in branches):
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"the branches were not trained with the same {flag}; train them again with one")
        self.rule = RULES[fusion](branches, **settings)
        self.stopwatch = Stopwatch(self.device)
        self.passes = self._predict_parts
        if self.device.type == "cuda":
            self.passes = CapturedPasses(self._predict_parts, self.stopwatches().values())

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        device: str = "cpu",
        precision: str = "auto",
        weights: dict[str, str | None] | None = None,
        **options: Any,
    ) -> USAD:
        """The fusion of the branches whose checkpoints lie in `folder`, for instance saved_models/coal_ad.

        `weights` gives the present place of weights files by branch name. `options` are `fusion` and the rule's
        settings; without them those of the folder's usad.json hold, or else `default_fusion`. The stored thresholds are
        used if they were made for the same options. Raises InputError that names every missing checkpoint, or what is
        wrong with one, with usad.json or with an argument.
        """
        weights = weights or {}
        require_known("weights: branch", weights, BRANCHES)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason, *_ = re.split(r"\.\s|\n", str(error))
            raise InputError(f"device {device}: {reason}") from None
        folder = Path(folder)
        paths = checkpoint_paths(folder)
        point = OperatingPoint.read(folder)
        current = point is not None and point.checkpoints == checkpoint_digests(folder)
        if point and not options:
            if not current:
                raise InputError(
                    f"{folder / FILE_NAME} was made for other checkpoints; run test_fusion.py --false-alarm-rate "
                    "again, or delete it"
                )
            options = point.fusion
        if "fusion" not in options:
            options = options | {"fusion": point.fusion["fusion"] if current else default_fusion(folder)}
        branches = [BRANCHES[name].load(path, weights.get(name), device, precision) for name, path in paths.items()]
        try:
            usad = cls(branches, **options)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        except TypeError as error:
            raise InputError(f"{folder}: these are no settings of the fusion {options['fusion']} ({error})") from None
        if current and point.fusion == usad.settings():
            usad.set_operating_point(point)
        return usad

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments beside the branches, as plain JSON values."""
        return {"fusion": self.rule.name, **self.rule.settings()}

    def numbers(self, images: list[Image.Image]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        batch = torch.stack([to_tensor(image, self.image_size, "bicubic") for image in images])
        parts = self.predict_parts(batch.to(self.device))
        return {name: part.arrays() for name, part in parts.items()}

    def predict(self, images: Tensor) -> Part:
        """Images [B, 3, S, S] at `image_size` -> fused scores [B] and maps [B, S, S]."""
        return self.predict_parts(images)[self.name]

    def parts(self) -> list[str]:
        return [self.name, *(branch.name for branch in self.branches)]

    def predict_parts(self, images: Tensor) -> dict[str, Part]:
        """The fused prediction, then each branch's own, maps all [B, S, S]; each branch sees the images resized.

        On a GPU this is captured (utils/gpu.py): branches and rule must no longer change.
        """
        return self.passes(images)

    def _predict_parts(self, images: Tensor) -> dict[str, Part]:
        def part(branch: Branch) -> Part:
            found = branch.predict(resize_images(images, branch.image_size))
            return found.resized(self.image_size).inside(self.roi)

        found = side_by_side([partial(part, branch) for branch in self.branches], self.device)
        parts = {branch.name: own for branch, own in zip(self.branches, found, strict=True)}
        return {self.name: self.fuse(parts), **parts}

    def fuse(self, parts: Mapping[str, Part]) -> Part:
        """The branches' parts, maps [B, S, S], as one."""
        with self.stopwatch("score"):
            return Part(*self.rule.fuse(parts)).inside(self.roi)

    def stopwatches(self) -> dict[str, Stopwatch]:
        """The times of the stages by part."""
        return {self.name: self.stopwatch, **{branch.name: branch.stopwatch for branch in self.branches}}
