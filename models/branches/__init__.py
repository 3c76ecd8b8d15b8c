"""The branches by name. A new one is a file with a subclass of `Branch`, and a line here."""

from utils.registry import Registry

BRANCHES = Registry(
    {
        "ma_clu": "models.branches.ma_clu:MACLU",
        "ma2patch": "models.branches.ma2patch:MA2Patch",
        "pc": "models.branches.patchcore:PatchCore",
    }
)
METHOD = ("ma_clu", "ma2patch", "pc")  # the branches of the paper: a folder of checkpoints holds at least these
COVARIANCES = ("empirical", "ledoit-wolf")
MAX_TILES = 16  # along each side of a frame


def weights_flag(branch: str) -> str:
    """The flag for the present place of a branch's weights file, for instance `--pc-weights`."""
    return f"--{branch.replace('_', '-')}-weights"
