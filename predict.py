"""Look for foreign objects in your own frames: images, folders, patterns, video files, a camera.

python predict.py belt/*.jpg                                    # saved_models/coal_ad -> predictions/
python predict.py belt.mp4 --category coal_demo --every 5 --smooth 3
python predict.py rtsp://user:password@camera/stream --json-lines | my_alarm    # until Ctrl-C
"""

import argparse
from typing import Any

from prediction.options import add_prediction_flags, prediction_settings
from training.options import add_models_flag, add_run_flags, add_weights_flags, record, run_settings, weights_by_branch
from utils.command_line import Parser, category_name, run
from utils.packages import importing


def main() -> None:
    parser = Parser(__doc__)
    add_prediction_flags(parser)
    add_models_flag(parser)
    parser.add_argument("--category", type=category_name, default="coal_ad", help="default: coal_ad")
    add_weights_flags(parser)
    add_run_flags(parser, workers=False)
    args = parser.parse_args()
    settings = prediction_settings(parser, args)

    with importing():  # OpenCV takes a second to import: --help and mistyped flags need none
        from prediction.run import predict

    predict(settings, lambda: load(args), args.batch_size, record(args))


def load(args: argparse.Namespace) -> Any:
    """USAD of the category's checkpoints."""
    with importing():
        from models.fusion.usad import USAD

    run = run_settings(args)
    return USAD.load(args.models_dir / args.category, run.device, run.precision, weights_by_branch(args))


if __name__ == "__main__":
    run(main)
