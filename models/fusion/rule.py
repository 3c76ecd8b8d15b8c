"""The one shape of a fusion rule: from the branches' parts to one score and one map."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from models.branches.branch import Branch, Part


class FusionRule(abc.ABC):
    """Built once from the branches, whose names, weights and statistics it may read; it changes nothing of them.

    Keyword arguments of a subclass's constructor are its settings: plain JSON values, which are stored with the
    thresholds (usad.json).
    """

    name: ClassVar[str]

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = [branch.name for branch in branches]

    @abc.abstractmethod
    def fuse(self, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
        """Parts by branch name, maps all [B, S, S] -> scores [B] (float64), maps [B, S, S]."""

    def settings(self) -> dict[str, Any]:
        """The constructor's keyword arguments, as plain JSON values."""
        return {}
