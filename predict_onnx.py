"""predict.py with an exported file: no PyTorch, only what requirements-edge.txt lists.

python predict_onnx.py my_belt.onnx belt/*.jpg                  # export_onnx.py makes the file
python predict_onnx.py my_belt.onnx rtsp://user:password@camera/stream --json-lines | my_alarm
"""

from pathlib import Path

from datasets import MAX_BATCH
from prediction.options import add_prediction_flags, prediction_settings
from training.options import record
from utils.command_line import Parser, number, run
from utils.packages import importing


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="a file that export_onnx.py has written")
    add_prediction_flags(parser)
    parser.add_argument("--batch-size", type=number(int, 1, MAX_BATCH), help="frames at a time (default: 1)")
    args = parser.parse_args()
    settings = prediction_settings(parser, args)

    with importing():  # OpenCV takes a second to import: --help and mistyped flags need none
        from models.exported.model import OnnxModel
        from prediction.run import predict

    predict(settings, lambda: OnnxModel.load(args.model), args.batch_size, record(args), "predict_onnx.py")


if __name__ == "__main__":
    run(main)
