"""Training patches in bounded memory."""

from collections.abc import Mapping

import torch
from torch import Tensor


class PatchStore:
    """Keeps the patches of `images` training images, at most `budget` GB (10^9 bytes) of float32.

    Within the budget all patches stay, in order. Beyond it each image keeps the same number of patches (or one more),
    drawn with its number as the seed, so that neither the batches nor the other processes matter to the choice. With
    tiles, images may differ in how many patches of them are looked at; those with few keep all.

    Rows [m, D] of an earlier fit may come first; each stands for some `counts` [m] of patches.
    """

    def __init__(self, images: int, budget: float, rows: Tensor | None = None, counts: Tensor | None = None) -> None:
        self.images = images
        self.budget = budget * 1e9
        self.earlier = rows
        self.counts = torch.zeros(0, dtype=torch.float64) if counts is None else counts.cpu()
        self.seen = 0  # patches
        self.kept: Tensor | None = None  # [n, D]; the system gives the memory only as patches are written
        self.filled = 0

    def add(self, patches: Tensor, index: Tensor) -> None:
        """Add the patches [B, N, D] of the images that have the numbers `index` [B] among all."""
        count, width = patches.shape[1:]
        total = self.images * count
        affordable = min(total, max(int(self.budget / (4 * width)), 1))
        self.seen += len(patches) * count
        if affordable == total:
            self._append(patches.reshape(-1, width), affordable)
            return
        rows = []
        for own, image in zip(patches, index.tolist(), strict=True):
            share = (image + 1) * affordable // self.images - image * affordable // self.images
            generator = torch.Generator().manual_seed(image)
            rows.append(own[torch.randperm(count, generator=generator)[:share].sort().values.to(own.device)])
        self._append(torch.cat(rows), affordable)

    def _append(self, rows: Tensor, capacity: int) -> None:
        if self.kept is None:
            self.kept = torch.empty(len(self.counts) + capacity, rows.shape[1])
            if self.earlier is not None:
                self._append(self.earlier, capacity)
        elif self.filled + len(rows) > len(self.kept):  # the first images had fewer patches than others
            length = max(len(self.counts) + capacity, 2 * self.filled + len(rows))
            kept, self.kept = self.rows(), torch.empty(length, rows.shape[1])
            self.kept[: self.filled] = kept
        self.kept[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def rows(self) -> Tensor:
        """All patches kept [n, D], on the CPU, those of an earlier fit first."""
        return self.kept[: self.filled]

    @property
    def share(self) -> float:
        """Patches of the images for which each kept one stands."""
        return self.seen / max(self.filled - len(self.counts), 1)

    def weights(self) -> Tensor:
        """For how many patches each of `rows` stands, float64 [n]."""
        new = torch.full((self.filled - len(self.counts),), self.share, dtype=torch.float64)
        return torch.cat([self.counts, new])

    def state(self) -> dict[str, Tensor]:
        return {} if self.kept is None else {"rows": self.rows(), "seen": torch.tensor(self.seen)}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the patches of the images that follow, given another store's `state()`."""
        if state:
            self._append(state["rows"], len(self.kept))
            self.seen += int(state["seen"])
