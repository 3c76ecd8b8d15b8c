"""Train PatchCore: a memory bank of normal textures.

python train_pc.py                                       # CoalAD, WideResNet-50-2 at 238 px, half of the images
python train_pc.py --category my_belt --train-ratio 1 --coreset-ratio 0.1
"""

import argparse

from models.branches import METHOD
from training.options import add_budget_flag, parse_training, share, training_parser
from utils.command_line import number, run
from utils.packages import importing


def main() -> None:
    parser = training_parser(__doc__, *METHOD["pc"], train_ratio=0.5)
    text = "share of the patches that the bank keeps (default: 0.01)"
    parser.add_argument("--coreset-ratio", type=share, default=0.01, help=text)
    text = "bank entries around the nearest one, itself included, that weight the score (default: 3)"
    parser.add_argument("--neighbors", type=number(int, 1), default=3, help=text)
    text = "whiten the patch features by the training patches' covariance"
    parser.add_argument("--whiten", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "make each entry of the bank the mean of the training patches nearest to it"
    parser.add_argument("--average-bank", action=argparse.BooleanOptionalAction, default=False, help=text)
    add_budget_flag(parser, default=8.0)
    args = parse_training(
        parser,
        train_ratio=1.0,
        coreset_ratio=0.05,
        patch_budget=0.1,  # 640,000 patches of 39 numbers, hence at most 32,000 entries, for any number of images
        whiten=True,
        average_bank=True,
    )

    with importing():  # PyTorch takes seconds to import: --help and mistyped flags need none
        from training.training import train

    train(args, "pc")


if __name__ == "__main__":
    run(main, torchrun=True)
