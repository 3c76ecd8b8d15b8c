"""Turn the checkpoint files of the authors' own program into this project's three checkpoints.

    python convert_published.py SRC        # SRC holds their four files; writes into saved_models/coal_ad
    python test_fusion.py

The four files are read as plain numbers: nothing in them is executed.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from models.branches.branch import Branch
from models.branches.ma2patch import MA2Patch
from models.branches.ma_clu import MACLU
from models.branches.patchcore import PatchCore
from models.networks.backbones import BackboneSpec, build_backbone
from models.published.checkpoints import PublishedCheckpoints, read_published
from training.training import checkpoint_path
from utils.checkpoint import check_replaceable
from utils.command_line import Parser, category_name, run, weights_by_branch
from utils.errors import InputError
from utils.locks import file_lock

# The networks that the authors fuse with, at their input sizes.
NETWORKS = {
    MACLU: ("tokens", "vit_small_patch14_dinov2.lvd142m", 350),
    MA2Patch: ("tokens", "vit_base_patch14_dinov2.lvd142m", 406),
    PatchCore: ("maps", "wide_resnet50_2", 238),
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the authors' four files")
    parser.add_argument("--models-dir", type=Path, default=Path("saved_models"), help="default: saved_models")
    parser.add_argument("--category", type=category_name, default="coal_ad", help="default: coal_ad")
    for branch_class in NETWORKS:
        parser.add_argument(
            branch_class.weights_flag,
            default="pretrained",
            help="pretrained, random, or a .safetensors/.pth file (default: pretrained)",
        )
    args = parser.parse_args()
    published = read_published(args.source)
    paths = {branch: checkpoint_path(args.models_dir, args.category, branch) for branch in NETWORKS}
    with contextlib.ExitStack() as locks:
        for path in paths.values():
            check_replaceable(path)
            locks.enter_context(file_lock(path))
        weights = weights_by_branch(args, NETWORKS)
        branches = [convert(branch, published, weights[branch.name], args.source) for branch in NETWORKS]
        for branch in branches:
            branch.training = {"category": args.category, "source": "the authors' checkpoint files"}
            branch.save(paths[type(branch)])
            print(f"{args.category}: wrote {paths[type(branch)]}")


def convert(branch_class: type[Branch], published: PublishedCheckpoints, weights: str, source: Path) -> Branch:
    """The branch with its network and the authors' numbers. Raises InputError where the two do not fit."""
    kind, name, size = NETWORKS[branch_class]
    settings: dict[str, Any] = {}
    tensors = {MACLU: published.ma_clu, MA2Patch: published.ma2patch, PatchCore: published.patchcore}[branch_class]
    if branch_class is PatchCore:
        size = published.image_size or size
        settings["neighbors"] = published.neighbors
        if published.coreset_ratio is not None:
            settings["coreset_ratio"] = published.coreset_ratio
    spec = BackboneSpec(kind, name, size).with_weights(weights)
    branch = branch_class(build_backbone(spec, flag=branch_class.weights_flag), **settings)
    try:
        branch.load_state(tensors)
    except InputError as error:
        raise InputError(f"{source}: the files of {branch_class.name} are not for {name}: {error}") from None
    return branch


if __name__ == "__main__":
    run(main)
