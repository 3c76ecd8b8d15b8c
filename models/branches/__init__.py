"""The branches by name. A new one is a file with a subclass of `Branch`, and a line here."""

from utils.registry import Registry

BRANCHES = Registry(
    {
        "ma_clu": "models.branches.ma_clu:MACLU",
        "ma2patch": "models.branches.ma2patch:MA2Patch",
        "pc": "models.branches.patchcore:PatchCore",
    }
)
METHOD = {  # the branches of the paper with their networks and input sizes; a checkpoint of each must be there
    "ma_clu": ("vit_small_patch14_dinov2.lvd142m", 350),
    "ma2patch": ("vit_base_patch14_dinov2.lvd142m", 406),
    "pc": ("wide_resnet50_2", 238),
}
COVARIANCES = ("empirical", "ledoit-wolf")
MAX_TILES = 16  # along each side of a frame


def weights_flag(branch: str) -> str:
    """The flag for the present place of a branch's weights file, for instance `--pc-weights`."""
    return f"--{branch.replace('_', '-')}-weights"
