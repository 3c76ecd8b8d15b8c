"""Fit one of anomalib's models on given images and write its raw maps and scores of others.

Run by reproduce_tables.py and benchmarks/patchcore.py, one process a model (utils/processes.py), with an interpreter
that has anomalib (requirements-baselines.txt). The job names the model, its seed, weights and settings, the training
and the test images, and the folder for scores.npy [N] float64 and maps.npy [N, h, w] float32. The numbers are those of
the model itself: anomalib's post-processor, which rescales and clamps them, is left out.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib import models
from anomalib.data import ImageBatch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import pil_to_tensor

from datasets.images import Decoding, read_image
from utils.errors import InputError
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
BATCH = {"efficient_ad": 1}  # as its paper, and anomalib, demand
VALIDATED = ("efficient_ad",)  # needs validation images for the quantiles of its maps


class Images(Dataset):
    """Image files as batches for anomalib, resized and normalised as the model expects them."""

    def __init__(self, paths: list[str], transform: nn.Module, decoding: Decoding) -> None:
        self.paths, self.transform, self.decoding = paths, transform, decoding

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(pil_to_tensor(read_image(self.paths[index], self.decoding)).float() / 255)


def collate(images: list[torch.Tensor]) -> ImageBatch:
    return ImageBatch(image=torch.stack(images), gt_label=torch.zeros(len(images), dtype=torch.long))


class TrainingImages(LightningDataModule):
    """The training images; a tenth of them is kept for validation if the model asks for it."""

    def __init__(self, images: Images, batch_size: int, workers: int, validated: bool) -> None:
        super().__init__()
        self.train_batch_size = batch_size
        self.options = {"batch_size": batch_size, "num_workers": workers, "collate_fn": collate}
        kept = max(1, len(images) // 10) if validated else 0
        self.fitted = Subset(images, range(len(images) - kept))
        self.kept = Subset(images, range(len(images) - kept, len(images)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.fitted, shuffle=True, **self.options)

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader(self.kept, **self.options) if len(self.kept) else []


def build(job: dict[str, Any]) -> nn.Module:
    """The model, with the weights that the job asks for."""
    name, weights = job["model"], job["weights"]
    settings = dict(job["settings"])
    if weights != ["pretrained"]:
        settings["pre_trained"] = False
    if name == "efficient_ad":
        settings["imagenet_dir"] = Path(torch.hub.get_dir()) / "imagenette"  # 1.5 GB, downloaded once
    kind = getattr(models, MODELS[name][0])
    if "image_size" in job:
        settings["pre_processor"] = kind.configure_pre_processor((job["image_size"],) * 2)
    model = kind(**BARE, **settings)
    if weights not in (["pretrained"], ["random"]):
        load_backbone(model.model.feature_extractor.feature_extractor, weights, model.model.backbone)
    return model


def load_backbone(net: nn.Module, files: list[str], name: str) -> None:
    """Fill `net`, cut from timm's `name`, from the first of the files that fits it."""
    needed = {key: value.shape for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    for file in files:
        state = read_state(file)
        if all(key in state and state[key].shape == shape for key, shape in needed.items()):
            net.load_state_dict({key: state[key] for key in needed}, strict=False)
            return
    raise InputError(f"not run: none of the weight files given is for its network, {name}")


def read_state(file: str) -> dict[str, torch.Tensor]:
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    return state.get("state_dict", state)


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Fit, predict, write; returns the settings in words, seconds, and the size of a memory bank."""
    name, device = job["model"], job["device"]
    start, processor = time.perf_counter(), time.process_time()
    seed_everything(job["seed"])
    model = build(job)
    transform, model.pre_processor = model.pre_processor.transform, None  # applied image by image: sizes may differ
    decoding = Decoding(**job.get("decoding", {}))
    images = TrainingImages(
        Images(job["train"], transform, decoding), BATCH.get(name, job["batch_size"]), job["workers"], name in VALIDATED
    )
    length = MODELS[name][1]
    kind, _, number = device.partition(":")
    trainer = Trainer(
        **{**model.trainer_arguments, **length, "devices": [int(number)] if number else 1},
        accelerator=kind,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=job["out"],
    )
    trainer.fit(model, datamodule=images)
    fitted = time.perf_counter()
    predict(model.model.to(device).eval(), Images(job["test"], transform, decoding), job)
    seconds = {"fit": fitted - start, "test": time.perf_counter() - fitted, "cpu": time.process_time() - processor}
    height, width = images.fitted[0].shape[-2:]
    network = getattr(model.model, "backbone", None) or getattr(model.model, "encoder_name", None)
    kind = {"random": "untrained", "pretrained": "pretrained"}.get(job["weights"][0], "weights from a file")
    lengths = [f"{value} {unit.removeprefix('max_')}" for unit, value in length.items() if value > 1]
    words = [f"{network} ({kind})" if isinstance(network, str) else kind, f"{width} x {height} px", *lengths]
    return {"setting": ", ".join(words), **seconds, "bank": len(getattr(model.model, "memory_bank", ()))}


def predict(net: nn.Module, images: Images, job: dict[str, Any]) -> None:
    """Raw scores and maps of the test images, in their order."""
    scores, maps = np.empty(len(images)), None
    out = Path(job["out"])
    start = 0
    for batch in DataLoader(images, job["batch_size"], num_workers=job["workers"]):
        with torch.no_grad():
            found = net(batch.to(job["device"]))
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
