"""Peak memory of a fit as images become more, beside a fit on as many as fill the patch budget."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from benchmarks.measure import Row
from benchmarks.settings import SEED, SMALL, Noise, Settings
from models import BRANCHES
from models.branches.branch import Branch
from models.networks.backbones import BackboneSpec, build_backbone, empty_backbone
from utils.processes import answer, run_module

SIZE = 64


def memory(settings: Settings, images: int) -> Iterator[Row]:
    """On small networks, in which a growth would show most; each branch that has a patch budget."""
    budget = 0.001 if settings.quick else 0.05  # GB
    for branch in BRANCHES.values():
        if "patch_budget" not in inspect.signature(branch).parameters:
            continue
        backbone, job = empty_backbone(network(branch)), {"branch": branch.name, "budget": budget}
        at_budget = int(budget * 1e9 / (4 * backbone.grid[0] * backbone.grid[1] * backbone.dim))
        count = max(images, 4 * at_budget)
        full, more = (run_module("benchmarks.memory", {**job, "images": number}) for number in (at_budget, count))
        grown, grown_full = more.memory["grown"], full.memory["grown"]
        against = f"a fit on the {at_budget} images that fill the budget"
        agreement = f"{grown:.0f} MB against {grown_full:.0f} MB: {grown / grown_full:.2f} times"
        details = {"mb": grown, "mb_at_budget": grown_full, "images_at_budget": at_budget, "budget_gb": budget}
        yield Row(f"memory of {branch.name}'s fit", count, "images", more.seconds, None, against, agreement, details)


def network(branch: type[Branch]) -> BackboneSpec:
    return BackboneSpec(branch.backbone_kind, SMALL[branch.backbone_kind][0], SIZE, weights="random", seed=SEED)


def fit(job: dict[str, Any]) -> None:
    """Fit on noise that is made as it is read."""
    branch = BRANCHES[job["branch"]]
    branch(build_backbone(network(branch)), patch_budget=job["budget"]).fit(Noise(job["images"], SIZE))


if __name__ == "__main__":
    answer(fit)
