"""Turn the checkpoint files of the authors' own program into this project's three checkpoints.

    python convert_published.py SRC        # SRC holds their four files; writes into saved_models/coal_ad
    python test_fusion.py

The four files are read as plain numbers: nothing in them is executed.
"""

from pathlib import Path

from models.branches import METHOD
from training.options import add_models_flag, add_weights_flags, weights_by_branch
from utils.command_line import Parser, category_name, run
from utils.packages import importing


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", metavar="SRC", type=Path, help="folder of the authors' four files")
    add_models_flag(parser)
    parser.add_argument("--category", type=category_name, default="coal_ad", help="default: coal_ad")
    add_weights_flags(parser, METHOD, default="pretrained")
    args = parser.parse_args()

    with importing():  # PyTorch takes seconds to import: --help needs none
        from models.published.checkpoints import convert

    convert(args.source, args.models_dir, args.category, weights_by_branch(args, METHOD))


if __name__ == "__main__":
    run(main)
