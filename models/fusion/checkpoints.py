"""The checkpoints of a category: which files they are, and which fusion they call for."""

from pathlib import Path

from models.branches import BRANCHES, METHOD
from models.branches.branch import bit_depth_in
from utils.checkpoint import read_metadata
from utils.errors import InputError
from utils.files import sha256_of_file


def checkpoint_path(folder: Path, branch: str) -> Path:
    """Where the checkpoint of the branch of that name lies in a category's folder."""
    return folder / f"{branch}.safetensors"


def checkpoint_paths(folder: Path) -> dict[str, Path]:
    """The checkpoints in `folder` by branch name.

    The paper's three must be there; other registered branches are added if they have been trained. Raises InputError
    that names every missing one.
    """
    paths = {name: checkpoint_path(folder, name) for name in BRANCHES}
    missing = [paths[name].name for name in METHOD if not paths[name].is_file()]
    if missing:
        raise InputError(
            f"{folder} has no {', '.join(missing)}; train with train_<branch>.py and copy trained_models/ to "
            "saved_models/ (or pass --models-dir trained_models), or use convert_published.py"
        )
    return {name: path for name, path in paths.items() if path.is_file()}


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the checkpoints in `folder`, by file name."""
    return {path.name: sha256_of_file(path) for path in checkpoint_paths(folder).values()}


def bit_depth_of(folder: Path) -> int:
    """The bit depth that the checkpoints in `folder` were trained with. Raises InputError if they cannot be read."""
    path = next(iter(checkpoint_paths(folder).values()))
    try:
        return bit_depth_in(read_metadata(path))
    except ValueError:
        raise InputError(f"{path} has a bit depth that cannot be; train the branch again") from None


def default_fusion(folder: Path) -> str:
    """The fusion for the checkpoints in `folder`: standardized if all have held-out statistics and `--weights` demo or
    imagenet, else the paper's.

    Raises InputError if one is missing or damaged.
    """
    for metadata in map(read_metadata, checkpoint_paths(folder).values()):
        network = metadata.get("backbone")
        small = isinstance(network, dict) and network.get("weights") in ("demo", "imagenet")
        if not small or metadata.get("calibration") is None:
            return "paper"
    return "standardized"
