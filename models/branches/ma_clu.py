"""MACLU: does the scene's composition look normal, and which patches are neither belt nor coal?"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.branches.branch import Branch
from models.branches.gaussian import Gaussian, RunningMoments
from models.branches.monochrome import CodecNoise
from models.branches.patch_store import PatchStore
from models.branches.postprocess import BLUR_SIGMA, gaussian_blur, map_range, resize_maps
from utils.checkpoint import take
from utils.distributed import is_main_process
from utils.errors import InputError
from utils.gather import collect

KMEANS_SEED = 42
SAME = 1e-5  # smaller differences between patches are rounding


class MACLU(Branch):
    """Global: Mahalanobis distance of the CLS token. Local: a patch's confidence to belong to the coal.

    Fit: Gaussian of the CLS tokens; k-means with two clusters on all patch tokens, the smaller one being the
    foreground (coal). Patches that are surely coal get the mean background confidence of their image; what is
    still high is foreground but not coal. The confidence is d_bg / d_fg, as in the authors' program.
    """

    name = "ma_clu"
    score_weight = 0.01

    def __init__(
        self, backbone: nn.Module, threshold: float = 1.14, covariance: str = "empirical", patch_budget: float = 1.0
    ) -> None:
        super().__init__(backbone)
        self.threshold = threshold
        self.covariance = covariance
        self.patch_budget = patch_budget
        self.gaussian: Gaussian | None = None
        self.centers: Tensor | None = None  # [2, D]: foreground, background
        self.sizes: Tensor | None = None  # [2], patches that each cluster has had

    def fit(self, loader: Iterable, clusters: Sequence[Tensor] = (), gaussian: Gaussian | None = None) -> None:
        """Fit on the images, and on those that gave the `clusters` (centres and sizes) and the `gaussian`."""
        fit = RunningMoments(self.covariance)
        patches = PatchStore(len(loader.dataset), self.patch_budget, *clusters)
        noise = CodecNoise(lambda images: self.extract(images)[0], self.backbone)
        for images, index, (cls, tokens) in self.extracted(loader):
            fit.update(cls)
            noise.update(images, index, cls)
            patches.add(tokens, index)
        if collect(fit, noise, patches):
            self.gaussian = fit.finish(noise.covariance(), gaussian)
            centers, self.sizes = _foreground_and_background(patches.rows(), patches.weights(), *clusters[:1])
            self.centers = centers.to(self.device)

    def update(self, loader: Iterable[dict[str, Any]]) -> None:
        self.fit(loader, (self.centers, self.sizes) if is_main_process() else (), self.gaussian)

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CLS token [B, E] and patch tokens [B, N, D]."""
        cls, tokens = self.backbone(images)
        return cls, self.looked_at(tokens)

    def patch_scores(self, features: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cls, tokens = features
        return self.gaussian.distance(cls), self.on_grid(self.confidence(tokens))

    def anomaly_map(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        confidence = self.on_grid(self.without_coal(self.looked_at(patches.flatten(1))))
        maps = resize_maps(confidence, self.tile_size)
        return gaussian_blur(maps, BLUR_SIGMA), *map_range(maps)

    def confidence(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, D] -> d_bg / d_fg [B, N]; above 1 means nearer to the coal than to the belt."""
        to_foreground, to_background = ((tokens - center).norm(dim=-1) for center in self.centers)
        return to_background / (to_foreground + 1e-8)

    def without_coal(self, confidence: Tensor) -> Tensor:
        """Replace confidences [B, N] above the threshold with the mean over the image's belt patches, if any."""
        background = confidence < 1
        count = background.sum(1, keepdim=True)
        mean = (confidence * background).sum(1, keepdim=True) / count.clamp(min=1)
        return torch.where((confidence > self.threshold) & (count > 0), mean, confidence)

    def state(self) -> dict[str, Tensor]:
        sizes = {} if self.sizes is None else {"sizes": self.sizes}
        return {**self.gaussian.state(), "centers": self.centers, **sizes}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.gaussian = Gaussian.from_state(tensors, self.backbone.cls_dim).to(self.device)
        self.centers = take(tensors, "centers", 2, self.backbone.dim).to(self.device)
        self.sizes = take(tensors, "sizes", 2) if "sizes" in tensors else None  # unknown of converted checkpoints


def _foreground_and_background(
    patches: Tensor, weights: Tensor, centers: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Two k-means centres [2, D] of weighted patches [n, D], that of the smaller cluster first, and their sizes [2].

    The search starts at `centers`, if given. The patches are shifted in place and back: a copy would take memory.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if (patches.amax(0) - patches.amin(0)).max() <= SAME * patches.abs().max().clamp(min=1):
        raise InputError("all training patches are identical: no belt and coal to tell apart; check train/good")
    # More than two threads would add their sums in a varying order, and the last digits would vary.
    with threadpool_limits(2, user_api="openmp"):
        start = "k-means++" if centers is None else centers.cpu().numpy()
        kmeans = KMeans(n_clusters=2, init=start, random_state=KMEANS_SEED, copy_x=False)
        kmeans.fit(patches.numpy(), sample_weight=(weights / weights[-1]).numpy())
    sizes = torch.from_numpy(kmeans.labels_).bincount(weights, minlength=2)
    order = sizes.argsort(stable=True)
    return torch.from_numpy(kmeans.cluster_centers_)[order].float(), sizes[order]
