"""Train any registered branch by its name, for instance one of your own; its settings are flags.

python -m training mean_frame --category my_belt --backbone resnet18 --image-size 224
"""

import argparse
import inspect
import sys

from models.branches import BRANCHES, METHOD
from training.options import parse_training, training_parser
from training.training import train
from utils.command_line import run
from utils.errors import InputError, require_known
from utils.settings import setting_types

NETWORKS = {"tokens": METHOD["ma_clu"], "maps": METHOD["pc"]}  # defaults, by kind


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    require_known("python -m training BRANCH …:", [name], BRANCHES)
    branch = BRANCHES[name]
    parser = training_parser(inspect.getdoc(branch) or __doc__, *NETWORKS[branch.backbone_kind], train_ratio=1.0)
    group = parser.add_argument_group("branch")
    for setting, (kind, _) in setting_types(branch).items():
        flag, default = f"--{setting.replace('_', '-')}", inspect.signature(branch).parameters[setting].default
        if flag in parser.flags():
            if setting == "seed":  # it is there for all trainings
                continue
            raise InputError(f"{branch.__name__}: each training has a flag {flag}; give its setting another name")
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        group.add_argument(flag, default=default, **how)
    train(parse_training(parser), name)


if __name__ == "__main__":
    run(main, torchrun=True)
