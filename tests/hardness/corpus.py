"""Good files of every kind that may come from strangers: the starting points of the fuzzers."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import torch
from pictures import IMAGES
from safetensors.torch import save_file

from datasets.coalad import extract
from models.branches.branch import Branch
from models.fusion.operating_point import FORMAT
from models.networks.backbones import BackboneSpec, empty_backbone
from models.networks.libraries import full_network, load_weights
from models.networks.weights import random_state_dict
from utils.checkpoint import load_checkpoint
from utils.errors import InputError

NETWORK = "test_resnet"


def weights(folder: Path) -> tuple[Path, Path]:
    """A network's weights, pickled by torch and as safetensors."""
    folder.mkdir(parents=True)
    state = random_state_dict(lambda: full_network(NETWORK), 22)
    torch.save(state, folder / "net.pth")
    save_file(state, folder / "net.safetensors")
    return folder / "net.pth", folder / "net.safetensors"


def read_weights(path: Path) -> str:
    """Reads weights and puts them into their network."""
    spec = BackboneSpec("maps", NETWORK, 64).with_weights(str(path))
    return load_weights(empty_backbone(spec).net, spec)


def load_and_predict(branch_class: type[Branch], path: Path) -> None:
    """Reads a checkpoint and, if it is taken, looks at an image with it."""
    network = load_checkpoint(path)[1].get("backbone")
    if isinstance(network, dict) and network.get("weights") == "pretrained":
        raise InputError("loading it downloads that network, as its training did: the one promised exception")
    branch = branch_class.load(path)
    if branch.image_size > 512:  # as large as it says, which takes as long as it takes
        return
    scores, maps, *_ = branch.predict(torch.zeros(1, 3, branch.image_size, branch.image_size))
    if not (torch.isfinite(scores).all() and torch.isfinite(maps).all()):
        raise InputError("refused by every script")  # Results and predict_images look for it


def operating_point(path: Path) -> Path:
    """A usad.json."""
    figures = {"threshold": 1.5, "pixel_threshold": 0.2, "false_alarm_rate": 0.01, "images": 120}
    fusion = {"fusion": "paper", "score_weights": {"ma_clu": 0.01}, "lambda_map": 1.0}
    rates = {"expected_rate": 0.008, "interval": [0.0002, 0.03]}
    path.write_text(json.dumps({"format": FORMAT, **figures, **rates, "fusion": fusion, "checkpoints": {"a": "b"}}))
    return path


def archives(folder: Path) -> list[Path]:
    """A small CoalAD in each of tar's formats."""
    folder.mkdir(parents=True)
    paths = []
    for name, kind in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        paths.append(folder / f"{name}.tar")
        with tarfile.open(paths[-1], "w", format=kind) as tar:
            for member in ("train/good/a.png", "test/good/b.png", "test/rope/" + "long" * 30 + ".png"):
                if kind == tarfile.USTAR_FORMAT and len(member) > 90:
                    continue
                info = tarfile.TarInfo(f"coal_ad/{member}")
                info.size = 700
                tar.addfile(info, io.BytesIO(bytes(range(250)) * 3))
    return paths


def unpack(path: Path) -> None:
    """Unpacks an archive into a folder beside it, which it removes."""
    folder = path.with_suffix(".unpacked")
    folder.mkdir()
    try:
        extract(path, folder)
    finally:
        shutil.rmtree(folder)


def images(folder: Path) -> list[Path]:
    """Images of every mode and format that is taken; those of 16 bits are a 12-bit camera's."""
    folder.mkdir(parents=True)
    for name, image, options, _ in IMAGES:
        if image.mode[0] != "I":
            image.save(folder / name, **options)
    rng = np.random.default_rng(3)
    for name, shape in (("deep", (17, 23)), ("deep_colors", (17, 23, 3))):
        for suffix in (".png", ".tif"):
            cv2.imwrite(str(folder / (name + suffix)), rng.integers(0, 4096, shape, dtype=np.uint16))
    return sorted(folder.iterdir())
