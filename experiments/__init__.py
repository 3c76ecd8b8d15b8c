"""The grid behind reproduce_tables.py: what is fitted, what is measured, and the tables made from it."""

from typing import Any, NamedTuple

from models.branches import COVARIANCES


class Sweep(NamedTuple):
    """The values that the sensitivity table gives a setting; the value in force is added if it is not among them."""

    title: str
    values: list[Any]
    owner: str | None = None  # the only branch whose setting it is


TABLES = ("comparison", "ablation", "sensitivity", "speed")
SWEEPS = {
    "threshold": Sweep("Foreground threshold (MACLU)", [1.0, 1.05, 1.1, 1.14, 1.2, 1.3, 1.5], "ma_clu"),
    "lambda_obj": Sweep("λ_obj, the factor of MACLU's score", [0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0]),
    "lambda_map": Sweep("λ_M, the factor of the map's maximum", [0.0, 0.1, 0.3, 1.0, 3.0, 10.0]),
    "coreset_ratio": Sweep("Coreset ratio (PatchCore)", [0.001, 0.003, 0.01, 0.03, 0.1], "pc"),
    "covariance": Sweep("Covariance estimator (MACLU and MA2Patch)", list(COVARIANCES)),
    "train_ratio": Sweep("Share of the training images, of all branches", [0.1, 0.25, 0.5, 0.75, 1.0]),
    "image_size": Sweep("Input resolution of {} in pixels", [0.6, 0.8, 1.2]),  # about this share of each branch's own
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
