"""Checkpoints: safetensors with JSON metadata. Reading one cannot run code."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.errors import InputError
from utils.files import atomic_write, check_writable

FORMAT = "usad-1"  # the metadata's only key: with several, safetensors writes them in an order that varies


def save_checkpoint(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write `tensors` and JSON-able `metadata` in one atomic step; see `check_replaceable`."""
    path = Path(path)
    check_replaceable(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(tensors, {FORMAT: json.dumps(metadata, sort_keys=True)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def load_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata.

    Raises InputError: not there, not safetensors, another program's, values that are not finite.
    """
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator here)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor '{name}' holds values that are not finite; train the branch again")
    return tensors, metadata


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata alone, without reading the tensors. Raises InputError as `load_checkpoint` does."""
    with _opened(path) as (_, metadata):
        return metadata


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, dict[str, Any]]]:
    if not Path(path).is_file():
        raise InputError(f"no checkpoint {path}; train the branch or give --models-dir")
    try:
        with safe_open(path, framework="pt") as file:
            content = file.metadata() or {}
            if FORMAT not in content:
                raise InputError(f"{path} is a safetensors file, but not a USAD checkpoint; train the branch again")
            metadata = json.loads(content[FORMAT])
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no dictionary")
            yield file, metadata
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as a USAD checkpoint ({error}); it may be truncated or of another kind: "
            "train the branch again, or turn published files into ours with convert_published.py"
        ) from None


def check_replaceable(path: Path) -> None:
    """Raise InputError if `path` holds a file that is not a USAD checkpoint; see also `check_writable`."""
    check_writable(path.parent)
    if path.exists():
        try:
            read_metadata(path)
        except (InputError, OSError):
            raise InputError(
                f"{path} exists and is not a USAD checkpoint; move it away or choose another --models-dir"
            ) from None


def take(tensors: dict[str, Tensor], name: str, *shape: int | None) -> Tensor:
    """Tensor `name` of a checkpoint; None in `shape` stands for any length. Raises InputError if it does not fit."""
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(f"tensor '{name}' is missing")
    fits = tensor.dim() == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits or not tensor.is_floating_point() or tensor.numel() == 0:
        expected = " x ".join("n" if length is None else str(length) for length in shape)
        raise InputError(f"tensor '{name}' is {tensor.dtype} {list(tensor.shape)}, expected floats {expected}")
    return tensor
