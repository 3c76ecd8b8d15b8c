"""anomalib's PatchCore on given images: seconds to fit and to test, imports not counted, and peak memory.

Run by run.py with an interpreter that has anomalib 2.7 (requirements-baselines.txt):

    python benchmarks/anomalib_patchcore.py JOB.json RESULT.json

The job: training and test image paths, network, image size, coreset ratio, neighbours, batch size, workers.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.models import Patchcore
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from torch.utils.data import DataLoader, Dataset

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Images(Dataset):
    """Files as normalised tensors [3, S, S], decoded and resized as the project does it."""

    def __init__(self, paths: list[str], size: int, resampling: Image.Resampling) -> None:
        self.paths, self.size, self.resampling = paths, size, resampling

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB").resize((self.size, self.size), self.resampling)
        pixels = torch.from_numpy(np.array(image)).float() / 255
        return ((pixels - MEAN) / STD).permute(2, 0, 1)


def collate(images: list[torch.Tensor]) -> ImageBatch:
    return ImageBatch(image=torch.stack(images), gt_label=torch.zeros(len(images), dtype=torch.long))


def main(job: dict) -> dict[str, float]:
    seed_everything(job["seed"])
    torch.set_num_threads(job["threads"])
    options = {"batch_size": job["batch_size"], "num_workers": job["workers"]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, processor = time.perf_counter(), time.process_time()
    model = Patchcore(
        backbone=job["network"],
        layers=("layer2", "layer3"),
        pre_trained=False,
        coreset_sampling_ratio=job["coreset_ratio"],
        num_neighbors=job["neighbors"],
        pre_processor=False,
        post_processor=False,
        evaluator=False,
        visualizer=False,
    )
    trainer = Trainer(
        **{**model.trainer_arguments, "max_epochs": 1, "devices": 1},
        accelerator=job["device"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    training = Images(job["train"], job["image_size"], Image.Resampling.BILINEAR)
    trainer.fit(model, DataLoader(training, collate_fn=collate, **options))
    fitted = time.perf_counter()
    test = Images(job["test"], job["image_size"], Image.Resampling.BICUBIC)
    net = model.model.to(job["device"]).eval()
    scores = []
    with torch.no_grad():
        for batch in DataLoader(test, **options):
            found = net(batch.to(job["device"]))
            scores += found.pred_score.double().reshape(-1).tolist()
            found.anomaly_map.cpu()
    end, processor = time.perf_counter(), time.process_time() - processor
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    seconds = {"fit": fitted - start, "test": end - fitted, "cpu": processor}
    return {**seconds, "memory": memory, "bank": len(net.memory_bank)}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(main(job)), encoding="utf-8")
