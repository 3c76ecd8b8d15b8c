"""The base class of metrics. A test set arrives in batches, and several processes may each see a part of it."""

import abc
from collections.abc import Mapping
from typing import ClassVar

import numpy as np


class Metric(abc.ABC):
    """The fusion and each branch get one of their own. All figures are fractions; None means undefined."""

    protocols: ClassVar[dict[str, str]]  # figure -> how it is defined, in a line; the key in metrics.json
    needs_masks: ClassVar[bool] = False  # if a defect has no masks, it gets no data: its figures are undefined

    @abc.abstractmethod
    def update(
        self,
        maps: np.ndarray,
        masks: np.ndarray,
        anomalous: np.ndarray,
        scores: np.ndarray,
        inside: np.ndarray | None = None,
    ) -> None:
        """Add maps [B, S, S] (float32), defect masks [B, S, S] (bool), labels [B] (bool) and image scores [B].

        Pixels that are not `inside` [S, S] (bool), the region of interest, do not count.
        """

    @abc.abstractmethod
    def compute(self) -> dict[str, float | None]:
        """The figures of `protocols`, of everything added so far."""

    def curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Points x and y of the curves for the report, by name."""
        return {}

    @abc.abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """Everything added so far, as plain arrays."""

    @abc.abstractmethod
    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add what another metric of this class has seen, given its `state()`."""
