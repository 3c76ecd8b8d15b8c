"""A Gaussian over image vectors and the Mahalanobis distance to it (MACLU and MA2Patch)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from utils.checkpoint import take
from utils.errors import InputError

RIDGE = 1e-6  # added to the covariance's diagonal before it is inverted


class RunningMoments:
    """Mean and scatter of a stream of vectors in double precision; the memory does not grow with the stream.

    Batches (and the moments of other processes) are merged by the pairwise update of Chan, Golub and LeVeque.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None  # [D]
        self.scatter: Tensor | None = None  # [D, D], sum of outer products of deviations

    def update(self, vectors: Tensor) -> None:
        """Add vectors [n, D]."""
        vectors = vectors.double()
        mean = vectors.mean(0)
        deviations = vectors - mean
        self._add(len(vectors), mean, deviations.T @ deviations)

    def state(self) -> dict[str, Tensor]:
        """Everything added so far; empty if nothing was."""
        if self.count == 0:
            return {}
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the vectors of another RunningMoments, given its `state()`."""
        if state:
            self._add(int(state["count"]), state["mean"], state["scatter"])

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Covariance [D, D] with divisor n - 1."""
        return self.scatter / (self.count - 1)


class Gaussian:
    """Mean [D], covariance [D, D] and the inverse of (covariance + 1e-6 I), all float64."""

    def __init__(self, mean: Tensor, covariance: Tensor, inverse: Tensor | None = None) -> None:
        self.mean = mean.double()
        self.covariance = covariance.double()
        if inverse is None:
            inverse = _inverse(self.covariance)
        self.inverse = (inverse.double() + inverse.double().mT) / 2
        self.root = _square_root(self.inverse)
        self.root_single = self.root.mT.float().contiguous()  # transposed, float32: for many vectors about their mean

    def to(self, device: torch.device | str) -> Gaussian:
        """The same Gaussian on `device`."""
        return Gaussian(self.mean.to(device), self.covariance.to(device), self.inverse.to(device))

    def state(self) -> dict[str, Tensor]:
        """Named tensors for a checkpoint."""
        return {"mean": self.mean, "covariance": self.covariance, "inverse": self.inverse}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], dim: int) -> Gaussian:
        """The Gaussian of a checkpoint; raises InputError where it does not fit a network of width `dim`."""
        return cls(
            take(tensors, "mean", dim),
            take(tensors, "covariance", dim, dim),
            take(tensors, "inverse", dim, dim),
        )

    def distance(self, vectors: Tensor) -> Tensor:
        """Mahalanobis distance of vectors [..., D] to the mean: sqrt(max(q, 0) + 1e-12), float64 [...]."""
        whitened = (vectors.double() - self.mean) @ self.root
        return (whitened.square().sum(-1) + 1e-12).sqrt()


class GaussianFit:
    """Collects the image vectors of a training pass; `finish` gives their Gaussian.

    `empirical` keeps running moments only. `ledoit-wolf` (shrinkage, for few images) keeps the vectors,
    4 bytes a channel and image.
    """

    def __init__(self, covariance: str = "empirical") -> None:
        self.estimator = covariance
        self.moments = RunningMoments()
        self.vectors: list[Tensor] = []

    def update(self, vectors: Tensor) -> None:
        """Add image vectors [n, D]."""
        self.moments.update(vectors)
        if self.estimator == "ledoit-wolf":
            self.vectors.append(vectors.float().cpu())

    def state(self) -> dict[str, Tensor]:
        """What was added so far."""
        return {**self.moments.state(), **({"vectors": torch.cat(self.vectors)} if self.vectors else {})}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the vectors of another GaussianFit, given its `state()`."""
        self.moments.merge(state)
        if "vectors" in state:
            self.vectors.append(state["vectors"])

    def finish(self, noise: Tensor | float = 0.0) -> Gaussian:
        """The Gaussian, `noise` [D, D] added to its covariance; warns if there are fewer images than that needs.

        Raises InputError for fewer than two images: they have no covariance.
        """
        if self.moments.count < 2:
            raise InputError(
                f"{self.moments.count} training image(s): a covariance needs at least two; "
                "add images to train/good, or raise --train-ratio if it is below 1"
            )
        covariance = self.moments.covariance()
        channels = len(covariance)
        if self.estimator == "empirical" and self.moments.count <= channels:
            warnings.warn(
                f"{self.moments.count} training images for {channels} channels: the covariance is singular, "
                "distances grow by orders of magnitude; --covariance ledoit-wolf suits small data sets",
                stacklevel=2,
            )
        if self.estimator == "ledoit-wolf":
            from sklearn.covariance import ledoit_wolf

            shrunk, _ = ledoit_wolf(torch.cat(self.vectors).double().numpy())
            covariance = torch.from_numpy(shrunk).to(covariance)
        return Gaussian(self.moments.mean, covariance + torch.as_tensor(noise).to(covariance))


def _inverse(covariance: Tensor) -> Tensor:
    """Inverse [D, D] of (covariance + 1e-6 I).

    Beside a variance of 1e11 or more the ridge is lost to rounding; then smaller variances are raised to the ridge.
    """
    ridged = covariance + RIDGE * torch.eye(len(covariance)).to(covariance)
    inverse, failed = torch.linalg.inv_ex(ridged)
    if failed or not torch.isfinite(inverse).all():
        values, vectors = torch.linalg.eigh(ridged)
        inverse = (vectors / values.clamp(min=RIDGE)) @ vectors.mT
    return inverse


def _square_root(inverse: Tensor) -> Tensor:
    """R [D, D] with R Rᵀ = inverse, so that a quadratic form is a squared length and cannot turn negative.

    An inverse stored in float32 may have slightly negative eigenvalues; they count as zero.
    """
    root, failed = torch.linalg.cholesky_ex(inverse)
    if failed:
        values, vectors = torch.linalg.eigh(inverse)
        root = vectors * values.clamp(min=0).sqrt()
    return root
