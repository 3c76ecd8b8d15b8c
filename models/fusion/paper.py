"""The paper's fusion: maps multiplied, scores added."""

import sys
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from models.branches.branch import Branch
from models.branches.part import Part
from models.branches.postprocess import gaussian_blur
from models.fusion.rule import FusionRule
from utils.errors import InputError, require_known


class PaperProduct(FusionRule):
    """M = product of the maps, each scaled to its own range; s = Σ weight · branch score + lambda_map · max M.

    The returned map is M after a 5x5 Gaussian blur. A branch's weight is its own unless `score_weights` names it.
    Raises InputError if it names another branch.
    """

    name = "paper"

    def __init__(
        self, branches: Sequence[Branch], score_weights: dict[str, float] | None = None, lambda_map: float = 1.0
    ) -> None:
        super().__init__(branches)
        own = {name: branch.score_weight for name, branch in self.branches.items()}
        require_known("score_weights: branch", score_weights or {}, own)
        self.score_weights = {name: _number(factor) for name, factor in (own | (score_weights or {})).items()}
        self.lambda_map = _number(lambda_map)

    def fuse(self, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
        product = torch.stack([part.scaled() for part in parts.values()]).prod(0)
        scores = sum(self.score_weights[name] * part.scores.double() for name, part in parts.items())
        scores = scores + self.lambda_map * product.amax((1, 2)).double()
        return scores, gaussian_blur(product, sigma=1.0, radius=2, edge_repeated=False)


def _number(factor: float) -> float:
    if not (isinstance(factor, Real) and abs(factor) <= sys.float_info.max):
        raise InputError(f"score_weights and lambda_map are finite numbers, not {factor!r}")
    return float(factor)
