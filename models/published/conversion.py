"""The authors' checkpoints as ours."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from models.branches import BRANCHES, weights_flag
from models.branches.branch import Branch
from models.fusion.checkpoints import checkpoint_path
from models.networks.backbones import BackboneSpec, build_backbone
from models.published.checkpoints import PublishedCheckpoints, read_published
from utils.checkpoint import check_replaceable
from utils.errors import InputError
from utils.locks import file_lock

# The networks that the authors fuse with, at their input sizes.
NETWORKS = {
    "ma_clu": ("tokens", "vit_small_patch14_dinov2.lvd142m", 350),
    "ma2patch": ("tokens", "vit_base_patch14_dinov2.lvd142m", 406),
    "pc": ("maps", "wide_resnet50_2", 238),
}


def convert(source: Path, models_dir: Path, category: str, weights: dict[str, str]) -> None:
    """Write the three checkpoints of `category` from the authors' four files in the folder `source`.

    `weights` gives the source of each network's weights by branch name. Raises InputError if a file is missing,
    damaged, or not for its network.
    """
    published = read_published(source)
    paths = {name: checkpoint_path(models_dir / category, name) for name in NETWORKS}
    with contextlib.ExitStack() as locks:
        for path in paths.values():
            check_replaceable(path)
            locks.enter_context(file_lock(path))
        branches = [converted(name, published, weights[name], source) for name in NETWORKS]
        for branch in branches:
            branch.training = {"category": category, "source": "the authors' checkpoint files"}
            branch.save(paths[branch.name])
            print(f"{category}: wrote {paths[branch.name]}")


def converted(name: str, published: PublishedCheckpoints, weights: str, source: Path) -> Branch:
    """The branch with its network and the authors' numbers. Raises InputError if the two do not fit."""
    kind, network, size = NETWORKS[name]
    settings: dict[str, Any] = {}
    tensors = {"ma_clu": published.ma_clu, "ma2patch": published.ma2patch, "pc": published.patchcore}[name]
    if name == "pc":
        size = published.image_size or size
        settings["neighbors"] = published.neighbors
        if published.coreset_ratio is not None:
            settings["coreset_ratio"] = published.coreset_ratio
    spec = BackboneSpec(kind, network, size).with_weights(weights)
    branch = BRANCHES[name](build_backbone(spec, flag=weights_flag(name)), **settings)
    try:
        branch.load_state(tensors)
    except InputError as error:
        raise InputError(f"{source}: the files of {name} are not for {network}: {error}") from None
    return branch
