"""A Gaussian over image vectors and the Mahalanobis distance to it (MACLU and MA2Patch)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from models.branches import COVARIANCES
from utils.checkpoint import take
from utils.errors import InputError, require_known

MOMENTS = ("mean", "scatter", "third", "fourth")
RIDGE = 1e-6  # added to the covariance's diagonal before it is inverted


class RunningMoments:
    """Moments of a stream of vectors in double precision; the memory does not grow with the stream.

    Two are merged exactly, after both are moved to the common mean (Chan, Golub and LeVeque).
    """

    def __init__(self, estimator: str = "empirical") -> None:
        require_known("--covariance", [estimator], COVARIANCES)
        self.estimator = estimator  # of the covariance
        self.count = 0
        self.mean: Tensor | None = None  # [D]
        self.scatter: Tensor | None = None  # [D, D], sum of outer products of the deviations d
        self.third: Tensor | None = None  # [D], sum of |d|² d
        self.fourth: Tensor | None = None  # sum of |d|⁴

    def update(self, vectors: Tensor) -> None:
        """Add vectors [n, D]."""
        vectors = vectors.double()
        mean = vectors.mean(0)
        deviations = vectors - mean
        squares = deviations.square().sum(1)
        self._add(len(vectors), mean, deviations.T @ deviations, squares @ deviations, squares.square().sum())

    def repeat(self, times: float) -> None:
        """As if each vector had been added that many times."""
        self.count = round(self.count * times)
        self.scatter, self.third, self.fourth = self.scatter * times, self.third * times, self.fourth * times

    def state(self) -> dict[str, Tensor]:
        """Everything added so far; empty if nothing was."""
        if self.count == 0:
            return {}
        moments = {name: getattr(self, name) for name in MOMENTS}
        return {"count": torch.tensor(self.count, dtype=torch.float64), **moments}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Add the vectors of another RunningMoments, given its `state()`."""
        if state:
            self._add(int(state["count"]), *(state[name] for name in MOMENTS))

    @staticmethod
    def taken(tensors: dict[str, Tensor], dim: int, prefix: str = "") -> dict[str, Tensor]:
        """The `state()` in a checkpoint, if there is one; raises InputError where it does not fit vectors [n, dim]."""
        shapes = {"count": (), "mean": (dim,), "scatter": (dim, dim), "third": (dim,), "fourth": ()}
        if f"{prefix}count" not in tensors:
            return {}
        return {name: take(tensors, prefix + name, *shape) for name, shape in shapes.items()}

    def _add(self, count: int, mean: Tensor, *moments: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, (self.scatter, self.third, self.fourth) = count, mean, moments
            return
        moments = [moment.to(self.mean) for moment in moments]
        step = mean.to(self.mean) - self.mean
        total = self.count + count
        ours = _moved(step * (-count / total), self.count, self.scatter, self.third, self.fourth)
        theirs = _moved(step * (self.count / total), count, *moments)
        self.scatter, self.third, self.fourth = (own + other for own, other in zip(ours, theirs, strict=True))
        self.mean = self.mean + step * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Covariance [D, D] with divisor n - 1, or shrunk towards a multiple of I (Ledoit and Wolf, 2004)."""
        if self.estimator == "empirical":
            return self.scatter / (self.count - 1)
        empirical = self.scatter / self.count
        target = empirical.trace() / len(empirical) * torch.eye(len(empirical)).to(empirical)
        distance = (empirical - target).square().sum()
        error = (self.fourth / self.count - empirical.square().sum()) / self.count
        share = (error / distance.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        return empirical + share * (target - empirical)

    def finish(self, noise: Tensor | float = 0.0, before: Gaussian | None = None) -> Gaussian:
        """The Gaussian of these images and those of `before`, their mean `noise` [D, D] added to its covariance.

        Raises InputError for fewer than two images: they have no covariance.
        """
        if before:
            earlier = RunningMoments(self.estimator)
            earlier.merge(before.moments)
            added = (before.covariance - earlier.covariance().to(before.covariance)) * earlier.count
            noise = (added + self.count * torch.as_tensor(noise).to(added)) / (earlier.count + self.count)
            self.merge(before.moments)
        if self.count < 2:
            raise InputError(
                f"{self.count} training image(s): a covariance needs at least two; "
                "add images to train/good, or raise --train-ratio if it is below 1"
            )
        covariance = self.covariance()
        channels = len(covariance)
        if self.estimator == "empirical" and self.count <= channels:
            warnings.warn(
                f"{self.count} training images for {channels} channels: the covariance is singular, "
                "distances grow by orders of magnitude; --covariance ledoit-wolf suits small data sets",
                stacklevel=2,
            )
        return Gaussian(self.mean, covariance + torch.as_tensor(noise).to(covariance), moments=self.state())


def _moved(step: Tensor, count: int, scatter: Tensor, third: Tensor, fourth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of `count` vectors about a point from which their mean is `step` [D] away."""
    square, spread, along = step.square().sum(), scatter.trace(), scatter @ step
    return (
        scatter + count * torch.outer(step, step),
        third + spread * step + 2 * along + count * square * step,
        fourth + 4 * (third + along) @ step + 2 * spread * square + count * square.square(),
    )


class Gaussian:
    """Mean [D], covariance [D, D] and the inverse of (covariance + 1e-6 I), all float64."""

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        inverse: Tensor | None = None,
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.moments = dict(moments or {})  # of the vectors it was fitted to, as `RunningMoments.state` gives them
        self.mean = mean.double()
        self.covariance = covariance.double()
        inverse = _inverse(self.covariance) if inverse is None else inverse.double()
        self.inverse = (inverse + inverse.mT) / 2
        # R with R Rᵀ = inverse, so that a quadratic form is a squared length and cannot turn negative. An inverse
        # stored in float32 may have slightly negative eigenvalues; they count as zero.
        self.root, failed = torch.linalg.cholesky_ex(self.inverse)
        if failed:
            values, vectors = torch.linalg.eigh(self.inverse)
            self.root = vectors * values.clamp(min=0).sqrt()
        self.root_single = self.root.mT.float().contiguous()  # transposed, float32: for many vectors about their mean

    def to(self, device: torch.device | str) -> Gaussian:
        return Gaussian(self.mean.to(device), self.covariance.to(device), self.inverse.to(device), self.moments)

    def state(self) -> dict[str, Tensor]:
        return {**self.moments, "mean": self.mean, "covariance": self.covariance, "inverse": self.inverse}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], dim: int) -> Gaussian:
        """The Gaussian of a checkpoint; raises InputError where it does not fit a network of width `dim`."""
        matrices = (take(tensors, name, dim, dim) for name in ("covariance", "inverse"))
        return cls(take(tensors, "mean", dim), *matrices, RunningMoments.taken(tensors, dim))

    def distance(self, vectors: Tensor) -> Tensor:
        """Mahalanobis distance of vectors [..., D] to the mean: sqrt(max(q, 0) + 1e-12), float64 [...]."""
        whitened = (vectors.double() - self.mean) @ self.root
        return (whitened.square().sum(-1) + 1e-12).sqrt()


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
