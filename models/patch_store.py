"""Training patches in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor


class PatchStore:
    """Keeps the patches of a training pass, at most `budget` GB (10^9 bytes) of float32.

    Below the budget every patch stays, in order. Above it each image keeps the same number of patches, drawn with
    a fixed seed, so that the memory does not grow with the number of images.
    """

    def __init__(self, images: int, budget: float, seed: int = 0) -> None:
        self.images = images
        self.budget = budget * 1e9
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: Tensor | None = None  # [images * per_image, D]
        self.per_image = 0
        self.filled = 0

    def add(self, patches: Tensor) -> None:
        """Add the patches [B, N, D] of a batch of images."""
        batch, count, width = patches.shape
        if self.kept is None:
            affordable = int(self.budget / (4 * width * self.images))
            self.per_image = max(min(count, affordable), 1)
            self.kept = torch.empty(self.images * self.per_image, width)
        if self.per_image < count:
            order = torch.rand(batch, count, generator=self.generator).argsort(1)
            chosen = order[:, : self.per_image].sort(1).values.to(patches.device)
            patches = patches.gather(1, chosen[..., None].expand(-1, -1, width))
        rows = patches.reshape(-1, width).cpu()
        self.kept[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def rows(self) -> Tensor:
        """All patches kept [n, D], on the CPU."""
        return self.kept[: self.filled]
