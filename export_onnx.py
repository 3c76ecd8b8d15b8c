"""Write a trained fusion as one ONNX file, for machines without PyTorch.

python export_onnx.py --category my_belt --out my_belt.onnx      # saved_models/my_belt, proved on data/my_belt
python predict_onnx.py my_belt.onnx belt/*.jpg           # on the other machine, with requirements-edge.txt

The file gets its name only if it predicts what PyTorch does on normal frames of the category.
"""

from pathlib import Path

from datasets import MAX_MEGAPIXELS
from training.options import add_models_flag, add_weights_flags
from utils.command_line import Parser, add_size_flag, category_name, run
from utils.packages import importing


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--category", type=category_name, default="coal_ad", help="default: coal_ad")
    add_models_flag(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file, whose name ends in .onnx")
    text = "holds <category>/train, for the proof (default: data)"
    parser.add_argument("--data-root", type=Path, default=Path("data"), help=text)
    kinds, text = ("fp32", "fp16", "int8"), "fp16: weights of half the size (default: fp32)"
    parser.add_argument("--precision", choices=kinds, metavar="{fp32,fp16}", default="fp32", help=text)
    add_size_flag(parser, MAX_MEGAPIXELS)
    add_weights_flags(parser)
    args = parser.parse_args()
    if args.precision == "int8":
        parser.error("--precision int8 is not offered: it loses detections (docs/on_the_line.md); take fp32 or fp16")

    with importing():  # PyTorch takes seconds to import: --help and mistyped flags need none
        from training.exporting import export

    export(args)


if __name__ == "__main__":
    run(main)
