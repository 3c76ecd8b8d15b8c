"""The branches and their fusion. A new branch joins `BRANCHES`."""

from models.branch import Branch
from models.ma2patch import MA2Patch
from models.ma_clu import MACLU
from models.patchcore import PatchCore
from models.usad import USAD

BRANCHES = (MACLU, MA2Patch, PatchCore)

__all__ = ["BRANCHES", "MACLU", "USAD", "Branch", "MA2Patch", "PatchCore"]
