"""MA2Patch: which patches push the whole image away from normal?"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.branches.branch import Branch
from models.branches.gaussian import Gaussian, RunningMoments
from models.branches.monochrome import CodecNoise
from models.branches.neighbors import exact_matmul
from models.branches.postprocess import BLUR_SIGMA, gaussian_blur, resize_maps
from models.networks.kernels import linear
from utils.gather import collect


class MA2Patch(Branch):
    """Global: Mahalanobis distance of the mean patch token. Local: how leaving a patch out changes it."""

    name = "ma2patch"
    score_weight = 0.0
    own_evidence = False  # on a CNN the score is MACLU's own number

    def __init__(self, backbone: nn.Module, covariance: str = "empirical") -> None:
        super().__init__(backbone)
        self.covariance = covariance
        self.gaussian: Gaussian | None = None

    def fit(self, loader: Iterable[dict[str, Any]], before: Gaussian | None = None) -> None:
        """Fit on the images, and on those of the Gaussian `before`."""
        fit = RunningMoments(self.covariance)
        noise = CodecNoise(lambda images: self.extract(images).mean(1), self.backbone)
        for images, index, tokens in self.extracted(loader):
            vectors = tokens.mean(1)
            fit.update(vectors)
            noise.update(images, index, vectors)
        if collect(fit, noise):
            self.gaussian = fit.finish(noise.covariance(), before)

    def update(self, loader: Iterable[dict[str, Any]]) -> None:
        self.fit(loader, self.gaussian)

    def extract(self, images: Tensor) -> Tensor:
        """Patch tokens [B, N, D]."""
        return self.looked_at(self.backbone(images)[1])

    def patch_scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        contribution = self.on_grid(self.contribution(features).float())
        return self.gaussian.distance(features.mean(1, dtype=torch.float64)), contribution

    def anomaly_map(self, patches: Tensor) -> tuple[Tensor, None, None]:
        return gaussian_blur(resize_maps(patches, self.tile_size), BLUR_SIGMA), None, None

    def contribution(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, N, D] -> |D_M(g) - D_M(g without patch i)| [B, N], float64.

        With c the whitened deviation of g and d_i that of p_i - g, g without patch i whitens to c - d_i / (N - 1). The
        difference of the squared lengths is taken before the roots, so that it keeps its digits.
        """
        others = max(tokens.shape[1] - 1, 1)
        mean = tokens.mean(1, keepdim=True, dtype=torch.float64)
        center = (mean - self.gaussian.mean) @ self.gaussian.root  # [B, 1, D]
        deviations = tokens - mean.float()
        with exact_matmul(tokens.device):
            along = (deviations @ (center @ self.gaussian.root.mT).mT.float())[:, :, 0].double()  # c . d_i
            whitened = linear(deviations.flatten(0, 1), self.gaussian.root_single)
        lengths = whitened.square().sum(-1).view_as(along).double()
        change = (lengths / others - 2 * along) / others
        distance = (center.square().sum(-1) + 1e-12).sqrt()
        return change.abs() / (distance + (distance.square() + change).clamp(min=1e-12).sqrt())

    def state(self) -> dict[str, Tensor]:
        return self.gaussian.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.gaussian = Gaussian.from_state(tensors, self.backbone.dim).to(self.device)
