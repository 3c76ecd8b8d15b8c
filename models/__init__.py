"""The branches and their fusion. A new branch joins `BRANCHES`."""

from models.branches.branch import Branch
from models.branches.ma2patch import MA2Patch
from models.branches.ma_clu import MACLU
from models.branches.patchcore import PatchCore
from models.fusion.usad import USAD

BRANCHES = (MACLU, MA2Patch, PatchCore)

__all__ = ["BRANCHES", "MACLU", "USAD", "Branch", "MA2Patch", "PatchCore"]
