"""The base class of fusion rules: from the branches' parts to one score and one map."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from models.branches.branch import Branch
from models.branches.part import Part
from utils.settings import settings_of


class FusionRule(abc.ABC):
    """A rule is built from the branches, and changes none of them.

    The keyword arguments of a subclass's constructor are its settings, stored with the thresholds in usad.json: plain
    JSON values, kept as attributes of the same names.
    """

    name: ClassVar[str]

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = {branch.name: branch for branch in branches}

    @abc.abstractmethod
    def fuse(self, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
        """Parts by branch name, maps all [B, S, S] -> scores [B] (float64), maps [B, S, S]."""

    def settings(self) -> dict[str, Any]:
        return settings_of(self)
