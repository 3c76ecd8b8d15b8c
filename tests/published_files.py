"""The authors' four checkpoint files, as their training leaves them."""

import pickle
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import KMeans

from models.published.checkpoints import KMEANS_FILE, MA2PATCH, MA_CLU, PATCHCORE


def gaussian_file(dim: int, images: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What the authors' program saves for a token branch."""
    vectors = torch.randn(images, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)
    covariance = torch.cov(vectors.T).reshape(dim, dim)
    return {
        "memory_bank_cls": vectors,
        "mean_vector": vectors.mean(0),
        "cov_matrix": covariance,
        "inv_cov_matrix": torch.linalg.inv(covariance + 1e-6 * torch.eye(dim)),  # column by column: not contiguous
    }


class Published:
    """Their content, for networks of so many channels; `write` puts it in a folder."""

    def __init__(self, dim: int = 16, dim2: int = 24, width: int = 32, protocol: int = 4, seed: int = 22) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ma_clu = gaussian_file(dim, 80, generator)
        self.ma2patch = gaussian_file(dim2, 90, generator)
        patches = torch.cat([torch.randn(200, dim, generator=generator), torch.randn(60, dim, generator=generator) + 4])
        kmeans = KMeans(2, random_state=42, n_init="auto").fit(patches.numpy())
        self.kmeans = {"kmeans": kmeans, "foreground_cluster": int(np.bincount(kmeans.labels_).argmin())}
        bank = torch.randn(50, width, generator=generator)
        settings = {"f_coreset": 0.01, "eps_coreset": 0.9, "k_nearest": 3, "backbone": "wide_resnet50_2"}
        self.patchcore = {"memory_bank": bank, **settings, "image_size": 238}
        self.protocol = protocol

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.ma_clu, folder / MA_CLU)
        torch.save(self.ma2patch, folder / MA2PATCH)
        torch.save(self.patchcore, folder / PATCHCORE)
        (folder / KMEANS_FILE).write_bytes(pickle.dumps(self.kmeans, self.protocol))
        return folder

    @property
    def centers(self) -> np.ndarray:
        """Foreground first."""
        foreground = self.kmeans["foreground_cluster"]
        return self.kmeans["kmeans"].cluster_centers_[[foreground, 1 - foreground]]
