"""PatchCore: which textures were never seen? (Roth et al., "Towards Total Recall", CVPR 2022)"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.branches.branch import Branch
from models.branches.coreset import greedy_k_center, sparse_projection
from models.branches.monochrome import CodecNoise
from models.branches.neighbors import NearestNeighbors
from models.branches.patch_store import PatchStore
from models.branches.postprocess import BLUR_SIGMA, gaussian_blur, map_range, resize_maps
from models.branches.whitening import ROWS, Whitening
from utils.checkpoint import take
from utils.distributed import is_main_process
from utils.errors import InputError
from utils.gather import collect


class PatchCore(Branch):
    """Global: reweighted distance of the strangest patch to a memory bank. Local: the distance of every patch to it.

    The bank is a greedy k-centre coreset of the training patches, chosen after a sparse random projection. A coreset
    prefers the patches farthest out, noise included; with `average_bank` each entry becomes the mean of the training
    patches nearest to it.
    """

    name = "pc"
    own_evidence = False  # the score is its map's strangest place, and the map's top is steadier
    map_weight = 16.0  # its map follows objects most closely by far; equal weights blur it
    backbone_kind = "maps"

    def __init__(
        self,
        backbone: nn.Module,
        coreset_ratio: float = 0.01,
        neighbors: int = 3,
        patch_budget: float = 8.0,
        seed: int = 22,
        whiten: bool = False,
        average_bank: bool = False,
    ) -> None:
        super().__init__(backbone)
        if not 0 < coreset_ratio <= 1 or neighbors < 1:
            raise InputError("--coreset-ratio lies in (0, 1], and --neighbors is 1 or more")
        self.whiten = whiten
        self.average_bank = average_bank
        self.whitening: Whitening | None = None
        self.coreset_ratio = coreset_ratio
        self.neighbors = neighbors
        self.patch_budget = patch_budget
        self.seed = seed
        self.memory_bank: NearestNeighbors | None = None
        self.counts: Tensor | None = None  # [m], patches whose mean each entry is

    def fit(self, loader: Iterable, bank: Sequence[Tensor] = (), whitening: Whitening | None = None) -> None:
        """Fit on the images, and on those of the `bank` (patches and what each stands for), which keeps its size."""
        store = PatchStore(len(loader.dataset), self.patch_budget, *bank)
        noise = CodecNoise(self.extract, self.backbone)
        for images, index, patches in self.extracted(loader):
            store.add(patches, index)
            if self.whiten:
                noise.update(images, index, patches)
        if collect(store, noise):
            self._select(store, noise.covariance(), whitening)

    def update(self, loader: Iterable[dict[str, Any]]) -> None:
        bank = self.memory_bank.rows
        patches = self.whitening.undone(bank) if self.whitening else bank
        counts = torch.ones(len(bank)) if self.counts is None else self.counts
        self.fit(loader, (patches, counts) if is_main_process() else (), self.whitening)

    def _select(self, store: PatchStore, noise: Tensor | float, before: Whitening | None) -> None:
        """Make the bank a coreset of the training patches, whitened with `noise` [D, D]."""
        patches, weights, old = store.rows(), store.weights(), len(store.counts)
        size = old or int(self.coreset_ratio * len(patches))
        if size < 1:
            raise InputError(
                f"--coreset-ratio {self.coreset_ratio} of {len(patches)} patches leaves none; raise the ratio"
            )
        if self.whiten:
            self.whitening = Whitening.fit(patches[old:], self.backbone.widths, noise, store.share, before)
            self.whitening.apply_(patches)
            self.whitening = self.whitening.to(self.device)
        projected = sparse_projection(patches, self.seed).to(self.device)
        chosen = max(1, size - (len(patches) - old)) if old else 1  # each new patch can take the place of one entry
        bank = NearestNeighbors(patches[greedy_k_center(projected, size, chosen=chosen)].to(self.device))
        if self.average_bank:
            means, self.counts = means_around(bank, patches, weights, chosen if old else 0)
            bank = NearestNeighbors(means.to(self.device))
        self.memory_bank = bank

    def extract(self, images: Tensor) -> Tensor:
        """Patch features [B, N, D] on the grid of the finest map, not yet whitened."""
        features_of = aligned_features if self.whiten else patch_features
        return self.looked_at(features_of(self.backbone(images), self.backbone.neighborhood))

    def patch_scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.whitening:
            features = self.whitening(features)
        batch, count, width = features.shape
        distances, nearest = self.memory_bank.search(features.reshape(-1, width), 1)
        distances, nearest = distances.view(batch, count), nearest.view(batch, count)
        return self.image_scores(features, distances, nearest), self.on_grid(distances)

    def anomaly_map(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gaussian_blur(resize_maps(patches, self.tile_size), BLUR_SIGMA), *map_range(patches)

    def image_scores(self, features: Tensor, distances: Tensor, nearest: Tensor) -> Tensor:
        """Patch features [B, N, D], distances to and indices of their nearest entries [B, N] -> scores [B].

        The largest distance s*, weighted down if the neighbours of the nearest entry are as near to the patch (eq. 6-7
        of the paper): (1 - exp(s*/√D) / Σ exp(‖m - n‖/√D)) s*, summed over the neighbours without the entry itself. A
        bank of one entry has no neighbours, and the score is s*.
        """
        largest, patch = distances.max(1)
        rows = torch.arange(features.shape[0], device=features.device)
        count = min(self.neighbors, len(self.memory_bank.rows))
        if count < 2:
            return largest
        entries = self.memory_bank.rows[nearest[rows, patch]]
        around = self.memory_bank.rows[self.memory_bank.search(entries, count)[1][:, 1:]]  # [B, count - 1, D]
        reach = (features[rows, patch][:, None] - around).norm(dim=-1)
        scale = features.shape[-1] ** 0.5
        farther = (reach - largest[:, None]).clamp(min=0)  # rounding could make it less
        weight = 1 - 1 / torch.exp(farther / scale).sum(1)
        return weight * largest

    def state(self) -> dict[str, Tensor]:
        counts = {} if self.counts is None else {"counts": self.counts}
        return {"bank": self.memory_bank.rows, **counts, **(self.whitening.state() if self.whitening else {})}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if self.whiten:
            self.whitening = Whitening.from_state(tensors, self.backbone.dim).to(self.device)
        self.memory_bank = NearestNeighbors(take(tensors, "bank", None, self.backbone.dim).to(self.device))
        self.counts = take(tensors, "counts", len(self.memory_bank.rows)) if "counts" in tensors else None


def patch_features(maps: Sequence[Tensor], neighborhood: int = 3) -> Tensor:
    """Layer maps [B, C, h, w], the finest first -> patch features [B, h*w, all channels].

    Each map is averaged over square neighbourhoods (stride 1, no padding) and pooled adaptively to the finest grid.
    """
    grid = maps[0].shape[-2:]
    pooled = [F.adaptive_avg_pool2d(F.avg_pool2d(layer, neighborhood, 1), grid) for layer in maps]
    return torch.cat(pooled, 1).flatten(2).mT.contiguous()


def aligned_features(maps: Sequence[Tensor], neighborhood: int = 3) -> Tensor:
    """As `patch_features`, but each feature stands in its cell of the frame: none is stretched towards the border.

    There, places between two cells are averaged a second time; here all are. A place whose neighbourhood reaches beyond
    the border, where padding is, takes the next place's. Cells of different maps are laid over each other whole: the
    first or last pixel of a cell, from which a network's strides count, differs by network and is half a cell off.
    """
    grid = maps[0].shape[-2:]
    aligned = []
    for layer in maps:
        for _ in range(2):
            means = F.avg_pool2d(layer, neighborhood, 1)
            layer = F.pad(means, [neighborhood // 2] * 4, mode="replicate")
        aligned.append(F.interpolate(layer, grid, mode="bilinear", align_corners=False))
    return torch.cat(aligned, 1).flatten(2).mT.contiguous()


def means_around(bank: NearestNeighbors, patches: Tensor, weights: Tensor, kept: int = 0) -> tuple[Tensor, Tensor]:
    """Of each entry of the bank the mean of the weighted patches [n, D] nearest to it, and their weight: [m, D], [m].

    The first `kept` patches are themselves the first entries. An entry without patches is left out. Summed on the CPU,
    where the order of the sum is always the same.
    """
    sums, counts = torch.zeros(bank.rows.shape, dtype=torch.float64), torch.zeros(len(bank.rows), dtype=torch.float64)
    sums[:kept], counts[:kept] = weights[:kept, None] * patches[:kept], weights[:kept]
    for rows, weight in zip(patches[kept:].split(ROWS), weights[kept:].split(ROWS), strict=True):
        nearest = bank.search(rows.to(bank.rows.device), 1)[1][:, 0].cpu()
        sums.index_add_(0, nearest, weight[:, None] * rows)
        counts += nearest.bincount(weight, minlength=len(counts))
    taken = counts > 0
    return (sums[taken] / counts[taken, None]).float(), counts[taken]
