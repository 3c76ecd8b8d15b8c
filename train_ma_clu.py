"""Train MACLU: object-level semantic composition (a ViT's CLS token, and coal against belt by k-means).

python train_ma_clu.py                                   # CoalAD, DINOv2 ViT-S/14 at 350 px
python train_ma_clu.py --category my_belt --weights dinov2_vits14.safetensors
"""

from models.branches import METHOD
from training.options import add_budget_flag, add_token_flags, parse_training, training_parser
from utils.command_line import number, run
from utils.packages import importing


def main() -> None:
    parser = training_parser(__doc__, *METHOD["ma_clu"], train_ratio=1.0)
    add_token_flags(parser)
    text = "foreground confidence above which a patch is surely coal (default: 1.14)"
    parser.add_argument("--threshold", type=number(float, 0, above=True), default=1.14, help=text)
    add_budget_flag(parser, default=1.0)
    args = parse_training(parser, covariance="ledoit-wolf", patch_budget=0.1)

    with importing():  # PyTorch takes seconds to import: --help and mistyped flags need none
        from training.training import train

    train(args, "ma_clu")


if __name__ == "__main__":
    run(main, torchrun=True)
