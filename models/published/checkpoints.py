"""The four checkpoint files of the authors' own program, read as plain tensors and written as ours."""

import contextlib
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.branches import BRANCHES, METHOD, weights_flag
from models.fusion.checkpoints import checkpoint_path
from models.networks.backbones import BackboneSpec, build_backbone
from models.networks.weights import reason
from models.published.plain_pickle import ARRAYS, Call, Name, array, follow
from utils.checkpoint import check_replaceable, take
from utils.errors import InputError
from utils.locks import file_lock

MA_CLU = "ma_memory_bank.pkl"
KMEANS_FILE = "confidence_model.pkl"
MA2PATCH = "ma2ptch_memory_bank.pkl"
PATCHCORE = "pc_memory_bank.pth"
FILES = (MA_CLU, KMEANS_FILE, MA2PATCH, PATCHCORE)
NEIGHBORS = 3
MAX_BYTES = 256 << 20  # of a pickle: a k-means model holds one number for each patch it was fitted on
KMEANS = {"sklearn.cluster._kmeans.KMeans", "sklearn.cluster.k_means_.KMeans"}  # renamed with scikit-learn 0.22
STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
}
TENSORS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", *STORAGES}


def convert(source: Path, models_dir: Path, category: str, weights: dict[str, str]) -> None:
    """Write the three checkpoints of `category` from the authors' four files in the folder `source`.

    `weights` gives the source of each network's weights by branch name. If one file is not for its network, nothing is
    written. Raises InputError if a file is missing, damaged, or not for its network.
    """
    tensors, settings = read_published(source)
    paths = {name: checkpoint_path(models_dir / category, name) for name in METHOD}
    with contextlib.ExitStack() as locks:
        for path in paths.values():
            check_replaceable(path)
            locks.enter_context(file_lock(path))
        branches = []
        for name, (network, size) in METHOD.items():
            own = {key: value for key, value in settings.items() if value is not None and name == "pc"}
            kind = BRANCHES[name].backbone_kind
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


def read_published(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The four files in `folder`: by branch the tensors that `load_state` takes, and PatchCore's settings.

    Nothing in them is executed. `coreset_ratio` and `image_size` are None where the file does not state them. Raises
    InputError if one is missing or damaged, or holds anything but the expected numbers.
    """
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
    return {"ma_clu": {**ma_clu, "centers": centers}, "ma2patch": ma2patch, "pc": {"bank": bank}}, settings


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (ValueError, InputError) as error:
        refusal = reason(error)
    except Exception as error:  # a damaged or hostile file may fail anywhere inside the readers
        if isinstance(error, OSError) and error.filename:
            raise
        refusal = f"damaged ({type(error).__name__}: {reason(error)})"
    raise InputError(f"{path} is refused: {refusal}; copy the authors' file again")


def _saved_by_torch(path: Path) -> dict[str, Any]:
    """The dictionary of plain values and tensors that torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are compressed or overlap, which torch.save never does")
        programs = [record.filename for record in records if record.filename.endswith("data.pkl")]
        if len(programs) != 1:
            raise ValueError("not written by torch.save")
        content = follow(archive.read(programs[0]), TENSORS)
        if type(content) is not dict:
            raise ValueError("no dictionary")
        folder = programs[0].removesuffix("data.pkl") + "data/"
        return {name: _tensor(archive, folder, value) for name, value in content.items()}


def _tensor(archive: zipfile.ZipFile, folder: str, value: Any) -> Any:
    """The tensor that a recorded call makes from numbers in `folder`; other values as they are."""
    if not (isinstance(value, Call) and value.name == "torch._utils._rebuild_tensor_v2"):
        return value
    storage, offset, shape, strides, *_ = value.args
    match storage:
        case Call("storage", ("storage", Name() as kind, str() as key, str(), int() as length)) if kind in STORAGES:
            numbers = torch.frombuffer(bytearray(archive.read(folder + key)), dtype=STORAGES[kind])
        case _:
            raise ValueError("a tensor that is not made of stored numbers")
    if len(numbers) != length:
        raise ValueError("a tensor has not the length that the file states")
    return numbers.as_strided(shape, strides, offset)  # refuses what lies beyond the numbers


def _gaussian(path: Path) -> dict[str, Tensor]:
    content = _saved_by_torch(path)
    mean = content.get("mean_vector")
    if isinstance(mean, Tensor) and mean.dim() == 2 and len(mean) == 1:
        content["mean_vector"] = mean[0]
    mean = _finite(content, "mean_vector", None)
    dim = len(mean)
    return {
        "mean": mean,
        "covariance": _finite(content, "cov_matrix", dim, dim),
        "inverse": _finite(content, "inv_cov_matrix", dim, dim),
    }


def _centers(path: Path) -> Tensor:
    """Both cluster centres [2, D], the foreground's first."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    match follow(path.read_bytes(), ARRAYS | KMEANS):
        case {"kmeans": Call(name, state=dict() as state), "foreground_cluster": foreground} if name in KMEANS:
            pass
        case _:
            raise ValueError("no dictionary of a fitted 'kmeans' and its 'foreground_cluster'")
    if isinstance(foreground, Call):
        foreground = array(foreground).item()
    if type(foreground) is not int or foreground not in (0, 1):
        raise ValueError("'foreground_cluster' is neither 0 nor 1")
    centers = {"cluster_centers_": torch.from_numpy(array(state.get("cluster_centers_")))}
    return _finite(centers, "cluster_centers_", 2, None)[[foreground, 1 - foreground]]


def _bank(path: Path) -> tuple[Tensor, dict[str, Any]]:
    content = _saved_by_torch(path)
    backbone = content.get("backbone")
    if isinstance(backbone, str) and "wideresnet50" not in re.sub("[^a-z0-9]", "", backbone.lower()):
        raise ValueError(f"made with {ascii(backbone)[:60]}, not with wide_resnet50_2")
    neighbors = content.get("k_nearest", NEIGHBORS)
    if type(neighbors) is not int or not 1 <= neighbors <= 1000:
        raise ValueError("'k_nearest' is no number from 1 to 1000")
    ratio = content.get("f_coreset")
    size = content.get("image_size")
    size = size[0] if type(size) in (tuple, list) and size else size
    return _finite(content, "memory_bank", None, None), {
        "neighbors": neighbors,
        "coreset_ratio": ratio if type(ratio) is float and 0 < ratio <= 1 else None,
        "image_size": size if type(size) is int and 1 <= size <= 10_000 else None,
    }


def _finite(content: dict[str, Any], name: str, *shape: int | None) -> Tensor:
    """A copy of tensor `name`, which must hold finite floats in this shape; None stands for any length."""
    if not isinstance(content.get(name), Tensor):
        raise ValueError(f"'{name}' is missing or no tensor")
    tensor = take(content, name, *shape)
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"'{name}' has more values than the file")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"'{name}' holds values that are not finite numbers")
    return tensor.clone(memory_format=torch.contiguous_format)
