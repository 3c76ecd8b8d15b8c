"""The published fusion test as a whole process: one image at a time, then lists of floats and threshold rescans.

python benchmarks/plain_fusion.py MODELS CATEGORY OUT.json      # the folder of checkpoints, one in MVTec layout
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, from anywhere

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import reference, reference_metrics
from datasets.loading import to_tensor
from datasets.mvtec import Category


def main(models: Path, folder: Path, out: Path) -> None:
    loop = reference.PublishedLoop.load(models)
    size = max(loop.sizes.values())
    scores, labels, maps, masks = [], [], [], []
    for item in Category(folder.parent, folder.name).test_samples():
        image = to_tensor(Image.open(item.path).convert("RGB"), size, "bicubic")[None]
        score, anomaly_map = loop(image)["fusion"]
        mask = np.zeros((size, size), bool)
        for path in item.masks:
            drawn = Image.open(path).convert("L").resize((size, size), Image.Resampling.NEAREST)
            mask |= np.asarray(drawn) >= 128
        for values, value in zip((scores, labels, maps, masks), (score, item.label, anomaly_map, mask), strict=True):
            values.append(value)
    bad = np.array(labels) == 1
    metrics = {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "pixel_auroc": reference_metrics.pixel_auroc(maps, masks),
        "pro_as_published": reference_metrics.pro_as_published(np.stack(maps)[bad], np.stack(masks)[bad]),
    }
    out.write_text(json.dumps({"metrics": metrics, "scores": scores}), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
