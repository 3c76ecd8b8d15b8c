"""USAD: networks, branches, and their fusion. `from models import USAD` is the door for other programs."""

from typing import Any

from models.branches import BRANCHES
from utils.registry import Registry

_DOORS = Registry(
    {
        "USAD": "models.fusion.usad:USAD",
        "Branch": "models.branches.branch:Branch",
        "Part": "models.branches.part:Part",
        "MACLU": "models.branches.ma_clu:MACLU",
        "MA2Patch": "models.branches.ma2patch:MA2Patch",
        "PatchCore": "models.branches.patchcore:PatchCore",
    }
)
__all__ = ["BRANCHES", *_DOORS]


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'models' has no attribute '{name}'")
    return _DOORS[name]
