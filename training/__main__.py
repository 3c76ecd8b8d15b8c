"""Train any registered branch by its name, for instance one of your own; its settings are flags.

python -m training mean_frame --category my_belt --backbone resnet18 --image-size 224
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import Any

from models.branches import BRANCHES
from training.options import parse_training, training_parser
from training.training import train
from utils.command_line import Parser, run
from utils.errors import InputError

NETWORKS = {"tokens": ("vit_small_patch14_dinov2.lvd142m", 350), "maps": ("wide_resnet50_2", 238)}  # defaults


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in BRANCHES:
        raise InputError(f"python -m training BRANCH …: '{name}' is not one of {', '.join(BRANCHES)}")
    branch = BRANCHES[name]
    parser = training_parser(inspect.getdoc(branch) or __doc__, *NETWORKS[branch.backbone_kind], train_ratio=1.0)
    settings = add_setting_flags(parser, branch)
    args = parse_training(parser)
    train(args, name, **{setting: getattr(args, setting) for setting in settings})


def add_setting_flags(parser: Parser, branch: Callable[..., Any]) -> list[str]:
    """A flag for each keyword argument of a branch's constructor, typed like its default; returns their names."""
    group = parser.add_argument_group("branch")
    settings = list(inspect.signature(branch).parameters.values())[1:]
    for setting in settings:
        flag, default = f"--{setting.name.replace('_', '-')}", setting.default
        if flag in parser.flags():  # --seed is there for all trainings
            continue
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            group.add_argument(flag, type=str if default is None else type(default), default=default)
    return [setting.name for setting in settings]


if __name__ == "__main__":
    run(main, torchrun=True)
