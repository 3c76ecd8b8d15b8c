"""Fuse the three branches and report image AUROC, pixel AUROC and PRO.

python test_fusion.py                                    # saved_models/coal_ad on data/coal_ad
python test_fusion.py --models-dir trained_models --category my_belt --fusion standardized
python test_fusion.py --false-alarm-rate 0.01            # and the thresholds that predict.py uses
"""

from training.options import (
    add_data_flags,
    add_fusion_flags,
    add_models_flag,
    add_output_flags,
    add_run_flags,
    add_weights_flags,
)
from utils.command_line import Parser, number, run
from utils.packages import importing


def main() -> None:
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_models_flag(parser)
    add_fusion_flags(parser)
    text = "find the thresholds for this rate on the held-out normal images, and store them for predict.py (usad.json)"
    parser.add_argument("--false-alarm-rate", type=number(float, 1e-6, 0.5), help=text)
    add_weights_flags(parser)
    add_run_flags(parser)
    add_output_flags(parser)
    args = parser.parse_args()

    with importing():  # PyTorch takes seconds to import: --help and mistyped flags need none
        from training.testing import test

    test(args)


if __name__ == "__main__":
    run(main, torchrun=True)
