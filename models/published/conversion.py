"""The authors' checkpoints as ours."""

from __future__ import annotations

import contextlib
from pathlib import Path

from models.branches import BRANCHES, weights_flag
from models.fusion.checkpoints import checkpoint_path
from models.networks.backbones import BackboneSpec, build_backbone
from models.published.checkpoints import read_published
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

    `weights` gives the source of each network's weights by branch name. If one file is not for its network, nothing is
    written.
    """
    tensors, settings = read_published(source)
    paths = {name: checkpoint_path(models_dir / category, name) for name in NETWORKS}
    with contextlib.ExitStack() as locks:
        for path in paths.values():
            check_replaceable(path)
            locks.enter_context(file_lock(path))
        branches = []
        for name, (kind, network, size) in NETWORKS.items():
            own = {key: value for key, value in settings.items() if value is not None and name == "pc"}
            spec = BackboneSpec(kind, network, own.pop("image_size", size)).with_weights(weights[name])
            branch = BRANCHES[name](build_backbone(spec, flag=weights_flag(name)), **own)
            try:
                branch.load_state(tensors[name])
            except InputError as error:
                raise InputError(f"{source}: the files of {name} are not for {network}: {error}") from None
            branch.training = {"category": category, "source": "the authors' checkpoint files"}
            branches.append(branch)
        for branch in branches:
            branch.save(paths[branch.name])
            print(f"{category}: wrote {paths[branch.name]}")
