"""The paper's fusion: maps multiplied, scores added."""

import math
from collections.abc import Mapping, Sequence

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
        self.score_weights = own | (score_weights or {})
        self.lambda_map = lambda_map
        for factor in (*self.score_weights.values(), lambda_map):
            if not (isinstance(factor, int | float) and math.isfinite(factor)):
                raise InputError(f"score_weights and lambda_map are numbers, not {factor!r}")

    def fuse(self, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor]:
        product = torch.stack([part.scaled() for part in parts.values()]).prod(0)
        scores = sum(self.score_weights[name] * part.scores.double() for name, part in parts.items())
        scores = scores + self.lambda_map * product.amax((1, 2)).double()
        return scores, gaussian_blur(product, sigma=1.0, radius=2, edge_repeated=False)
