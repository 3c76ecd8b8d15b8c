"""The grid behind reproduce_tables.py: what is fitted, what is measured, and the tables made from it."""

from typing import Any

from models.branches import COVARIANCES

TABLES = ("comparison", "ablation", "sensitivity", "speed")
SWEEPS: dict[str, list[Any]] = {  # name -> values; the value in force is added if it is not among them
    "threshold": [1.0, 1.05, 1.1, 1.14, 1.2, 1.3, 1.5],
    "lambda_obj": [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0],
    "lambda_map": [0.0, 0.1, 0.3, 1.0, 3.0, 10.0],
    "coreset_ratio": [0.001, 0.003, 0.01, 0.03, 0.1],
    "covariance": list(COVARIANCES),
    "train_ratio": [0.1, 0.25, 0.5, 0.75, 1.0],
    "image_size": [0.6, 0.8, 1.2],  # about this share of the branch's own size
}
BASELINES = {
    "padim": "PaDiM",
    "patchcore": "PatchCore",
    "stfpm": "STFPM",
    "reverse_distillation": "Reverse Distillation",
    "efficient_ad": "EfficientAD",
    "dinomaly": "Dinomaly",
    "anomaly_dino": "AnomalyDINO",
}
