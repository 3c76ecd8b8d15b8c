"""Train any registered branch by its name, for instance one of your own; its settings are flags.

python -m training mean_frame --category my_belt --backbone resnet18 --image-size 224
"""

import argparse
import inspect
import sys

from models.branches import BRANCHES
from training.options import parse_training, training_parser
from training.training import train
from utils.command_line import run
from utils.errors import require_known

NETWORKS = {"tokens": ("vit_small_patch14_dinov2.lvd142m", 350), "maps": ("wide_resnet50_2", 238)}  # defaults


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    require_known("python -m training BRANCH …:", [name], BRANCHES)
    branch = BRANCHES[name]
    parser = training_parser(inspect.getdoc(branch) or __doc__, *NETWORKS[branch.backbone_kind], train_ratio=1.0)
    group = parser.add_argument_group("branch")
    for setting in list(inspect.signature(branch).parameters.values())[1:]:
        flag, default = f"--{setting.name.replace('_', '-')}", setting.default
        if flag in parser.flags():  # --seed is there for all trainings
            continue
        kind = {"type": str if default is None else type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(flag, default=default, **kind)
    train(parse_training(parser), name)


if __name__ == "__main__":
    run(main, torchrun=True)
