"""Fit one of anomalib's models on given images and write its raw maps and scores of others.

Run by reproduce_tables.py, one process a model (utils/processes.py), with an interpreter that has anomalib
(requirements-baselines.txt). The job names the model, its seed and settings, the training and the test images, and the
folder for scores.npy [N] float64 and maps.npy [N, h, w] float32; its "network" replaces the model's own. The numbers
are those of the model itself: anomalib's post-processor, which rescales and clamps them, is left out.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib import models
from anomalib.data import ImageBatch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets.images import Decoding, read_picture
from utils.processes import answer

BARE = {"post_processor": False, "evaluator": False, "visualizer": False}
# Class and length of training (the papers'; none stops early, for that would look at labelled images).
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "padim": ("Padim", {"max_epochs": 1}),
    "patchcore": ("Patchcore", {"max_epochs": 1}),
    "stfpm": ("Stfpm", {"max_epochs": 100}),
    "reverse_distillation": ("ReverseDistillation", {"max_epochs": 200}),
    "efficient_ad": ("EfficientAd", {"max_steps": 70_000}),
    "dinomaly": ("Dinomaly", {"max_steps": 5_000}),
    "anomaly_dino": ("AnomalyDINO", {"max_epochs": 1}),
}
STRIDES = {"padim": (4, 8, 16), "patchcore": (8, 16)}  # of the maps that they take of a network
PADIM_CHANNELS = {"wide_resnet50_2": 550}  # its paper keeps so many, of smaller networks 100


class Images(Dataset):
    """Image files as tensors, resized and normalised as the model expects them."""

    def __init__(self, paths: list[str], transform: nn.Module, decoding: Decoding) -> None:
        self.paths, self.transform, self.decoding = paths, transform, decoding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(pil_to_tensor(read_picture(self.paths[index], self.decoding).image).float() / 255)


def collate(images: list[torch.Tensor]) -> ImageBatch:
    return ImageBatch(image=torch.stack(images), gt_label=torch.zeros(len(images), dtype=torch.long))


def build(job: dict[str, Any]) -> nn.Module:
    """The model, with the network that the job gives."""
    name, network = job["model"], job["network"]
    kind, settings = getattr(models, MODELS[name][0]), {}
    if name == "patchcore":
        settings = {"coreset_sampling_ratio": job["coreset_ratio"], "num_neighbors": job["neighbors"]}
    if name == "efficient_ad":
        settings["imagenet_dir"] = Path(torch.hub.get_dir()) / "imagenette"  # 1.5 GB, downloaded once
    if not network:
        return kind(**BARE, **settings)
    available = timm.create_model(network["name"], features_only=True).feature_info.reduction()
    settings |= {"backbone": network["name"], "pre_trained": False}
    settings["layers"] = [available.index(stride) for stride in STRIDES[name]]
    if name == "padim":
        settings["n_features"] = PADIM_CHANNELS.get(network["name"], 100)
    model = kind(**BARE, **settings, pre_processor=kind.configure_pre_processor((network["image_size"],) * 2))
    net, tensors = model.model.feature_extractor.feature_extractor, load_file(network["weights"])
    unknown = net.load_state_dict(tensors, strict=False).unexpected_keys  # layers behind the last map may be missing
    if unknown:
        raise ValueError(f"anomalib's {network['name']} has no {unknown[0]}")
    return model


def main(job: dict[str, Any]) -> str:
    """Fit, predict, write; returns the settings in words."""
    name, run = job["model"], job["run"]
    seed_everything(job["seed"])
    model = build(job)
    transform, model.pre_processor = model.pre_processor.transform, None  # applied image by image: sizes may differ
    train, test = (Images(job[part], transform, Decoding(**job["decoding"])) for part in ("train", "test"))
    batches = {"batch_size": run["batch_size"], "num_workers": run["workers"], "collate_fn": collate}
    validation = None
    if name == "efficient_ad":  # one image at a time, as its paper; a tenth gives the quantiles of its maps
        batches["batch_size"], kept = 1, max(1, len(train) // 10)
        validation = DataLoader(Subset(train, range(len(train) - kept, len(train))), **batches)
        train = Subset(train, range(len(train) - kept))
    length = MODELS[name][1]
    kind, _, number = run["device"].partition(":")
    trainer = Trainer(
        **{**model.trainer_arguments, **length, "devices": [int(number)] if number else 1},
        accelerator=kind,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=job["out"],
    )
    trainer.fit(model, DataLoader(train, shuffle=True, **batches), validation)
    predict(model.model.to(run["device"]).eval(), test, run, Path(job["out"]))
    height, width = train[0].shape[-2:]
    network = job["network"]["name"] if job["network"] else getattr(model.model, "backbone", "")
    words = ["the network of our PatchCore" if job["network"] else f"pretrained {network}".strip()]
    words += [f"{width} x {height} px", *(f"{n} {unit.removeprefix('max_')}" for unit, n in length.items() if n > 1)]
    words += [f"{key.replace('_', ' ')} {job[key]:g}" for key in ("coreset_ratio", "neighbors") if key in job]
    return ", ".join(words)


def predict(net: nn.Module, images: Images, run: dict[str, Any], out: Path) -> None:
    """Raw scores and maps of the test images, in their order."""
    scores, maps, start = np.empty(len(images)), None, 0
    for batch in DataLoader(images, run["batch_size"], num_workers=run["workers"]):
        with torch.no_grad():
            found = net(batch.to(run["device"]))
        found_maps = found.anomaly_map.float().reshape(len(batch), *found.anomaly_map.shape[-2:]).cpu().numpy()
        if maps is None:
            shape = (len(images), *found_maps.shape[1:])
            maps = np.lib.format.open_memmap(out / "maps.npy", "w+", np.float32, shape)
        maps[start : start + len(batch)] = found_maps
        scores[start : start + len(batch)] = found.pred_score.double().reshape(-1).cpu().numpy()
        start += len(batch)
    maps.flush()
    np.save(out / "scores.npy", scores)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    answer(main)
