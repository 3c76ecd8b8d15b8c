"""Train MA2Patch: semantic attribution of the image's global deviation to its patches.

python train_ma2patch.py                                 # CoalAD, DINOv2 ViT-B/14 at 406 px
python train_ma2patch.py --category my_belt --covariance ledoit-wolf
"""

from models.branches import METHOD
from training.options import add_token_flags, parse_training, training_parser
from utils.command_line import run
from utils.packages import importing


def main() -> None:
    parser = training_parser(__doc__, *METHOD["ma2patch"], train_ratio=1.0)
    add_token_flags(parser)
    args = parse_training(parser, covariance="ledoit-wolf")

    with importing():  # PyTorch takes seconds to import: --help and mistyped flags need none
        from training.training import train

    train(args, "ma2patch")


if __name__ == "__main__":
    run(main, torchrun=True)
