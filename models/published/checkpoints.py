"""The four checkpoint files of the authors' own program, read as plain tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.published.plain_pickle import Call, TorchFile, array, load_pickle
from utils.errors import InputError

MA_CLU = "ma_memory_bank.pkl"
KMEANS_FILE = "confidence_model.pkl"
MA2PATCH = "ma2ptch_memory_bank.pkl"
PATCHCORE = "pc_memory_bank.pth"
FILES = (MA_CLU, KMEANS_FILE, MA2PATCH, PATCHCORE)
NEIGHBORS = 3
Content = TypeVar("Content")


@dataclasses.dataclass(frozen=True)
class PublishedCheckpoints:
    """Tensors by the names that our branches' `load_state` takes, and what else the files say.

    ma_clu: mean [D], covariance [D, D], inverse [D, D] as stored, centers [2, D] (foreground first).
    ma2patch: mean, covariance, inverse. patchcore: bank [M, D]. Sizes that a file does not state are None.
    """

    ma_clu: dict[str, Tensor]
    ma2patch: dict[str, Tensor]
    patchcore: dict[str, Tensor]
    neighbors: int
    coreset_ratio: float | None
    image_size: int | None


def read_published(folder: Path) -> PublishedCheckpoints:
    """Read the four files in `folder`; nothing in them is executed.

    Raises InputError where one is missing, damaged, or holds anything but the numbers expected.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}; give the folder that holds all four of the authors' files "
            f"({', '.join(FILES)}), in their program saved_models/coal_ad"
        )
    ma_clu = _read(folder / MA_CLU, _gaussian)
    centers = _read(folder / KMEANS_FILE, _centers)
    if centers.shape[1] != len(ma_clu["mean"]):
        raise InputError(
            f"{folder / KMEANS_FILE} has cluster centres of {centers.shape[1]} channels, {MA_CLU} a mean of "
            f"{len(ma_clu['mean'])}: they are not of one training; copy both from the same one"
        )
    ma2patch = _read(folder / MA2PATCH, _gaussian)
    bank, settings = _read(folder / PATCHCORE, _bank)
    return PublishedCheckpoints({**ma_clu, "centers": centers}, ma2patch, {"bank": bank}, **settings)


def _read(path: Path, read: Callable[[Path], Content]) -> Content:
    try:
        return read(path)
    except ValueError as error:
        raise InputError(f"{path} is refused: {error}; copy the authors' file again") from None


def _gaussian(path: Path) -> dict[str, Tensor]:
    with TorchFile(path) as file:
        mean = file.tensor("mean_vector")
        tensors = {"mean": mean.reshape(-1) if mean.shape[:-1] in ((), (1,)) else mean}
        dim = tensors["mean"].shape[-1:]
        for ours, theirs in (("covariance", "cov_matrix"), ("inverse", "inv_cov_matrix")):
            tensors[ours] = file.tensor(theirs)
            _check(tensors[ours], theirs, *dim, *dim)
        _check(tensors["mean"], "mean_vector", *dim)
    return tensors


def _centers(path: Path) -> Tensor:
    """Both cluster centres [2, D], the foreground's first."""
    match load_pickle(path):
        case {"kmeans": Call(meaning="kmeans", state=dict() as state), "foreground_cluster": foreground}:
            pass
        case _:
            raise ValueError("no dictionary of a fitted 'kmeans' and its 'foreground_cluster'")
    if isinstance(foreground, Call):
        foreground = array(foreground).item()
    if type(foreground) is not int or foreground not in (0, 1):
        raise ValueError("'foreground_cluster' is neither 0 nor 1")
    centers = torch.from_numpy(array(state.get("cluster_centers_")))
    _check(centers, "cluster_centers_", 2, None)
    return centers[[foreground, 1 - foreground]]


def _bank(path: Path) -> tuple[Tensor, dict[str, Any]]:
    with TorchFile(path) as file:
        bank = file.tensor("memory_bank")
        content = file.content
    _check(bank, "memory_bank", None, None)
    backbone = content.get("backbone")
    if isinstance(backbone, str) and "wideresnet50" not in re.sub("[^a-z0-9]", "", backbone.lower()):
        raise ValueError(f"made with {ascii(backbone)[:60]}, not with wide_resnet50_2")
    neighbors = content.get("k_nearest", NEIGHBORS)
    if type(neighbors) is not int or not 1 <= neighbors <= 1000:
        raise ValueError("'k_nearest' is no number from 1 to 1000")
    ratio = content.get("f_coreset")
    size = content.get("image_size")
    size = size[0] if type(size) in (tuple, list) and size else size
    return bank, {
        "neighbors": neighbors,
        "coreset_ratio": ratio if type(ratio) is float and 0 < ratio <= 1 else None,
        "image_size": size if type(size) is int and 1 <= size <= 10_000 else None,
    }


def _check(tensor: Tensor, name: str, *shape: int | None) -> None:
    """Raise ValueError unless `tensor` is of finite floats and this shape; None stands for any length."""
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.numel() == 0:
        expected = " x ".join("n" if length is None else str(length) for length in shape)
        raise ValueError(f"'{name}' has the shape {list(tensor.shape)}, expected {expected}")
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise ValueError(f"'{name}' holds values that are not finite numbers")
