"""Command lines: shared flags with their ranges, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from utils import distributed
from utils.errors import InputError
from utils.redact import redact
from utils.signals import Terminated, leave_signals, watch_signals

if TYPE_CHECKING:
    from models.branches.branch import Branch

OUT_OF_MEMORY = "out of memory|can't allocate memory"  # what torch says of a GPU's, and of a CPU's
CONNECTION_LOST = "[Cc]onnection (closed|reset)"  # what gloo and NCCL say when another process is gone
LOST_WORKER = r"DataLoader worker .* (killed by signal|exited unexpectedly)"
_warned: set[Hashable] = set()  # the keys of `warn_once`
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line with the remedy, exit code 2; no abbreviated flags."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(flag, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            self.error(f"unknown argument {flag}: {hint}{self.prog} --help lists what this script takes")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")


def fail(message: str, details: Sequence[str] = ()) -> None:
    """Say why the run ends, after the details; of several processes the first does."""
    if distributed.first_to_fail():
        for detail in details:
            _say(detail)
        _say(f"error: {message}")


def warn(message: str) -> None:
    """Say what may be wrong."""
    _say(f"warning: {message}")


def warn_once(key: Hashable, message: str) -> None:
    """Say it unless something with the same `key` has been said in this run."""
    if key not in _warned:
        _warned.add(key)
        warn(message)


def _say(message: str) -> None:
    """Print one line on stderr, without any camera's password."""
    print(redact(" ".join(message.split())), file=sys.stderr)


def run(main: Callable[[], None], torchrun: bool = False) -> NoReturn:
    """Run a script; exit with 0 (done), 2 (bad input), 130 (interrupted), 143 (terminated) or 1 (else).

    `torchrun`: the script can share its work with the other processes that torchrun started.
    """
    watch_signals()
    _warned.clear()
    with contextlib.suppress(AttributeError):  # not a file
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    code = 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: warn(str(message))
            with distributed.processes():
                if distributed.size() > 1 and not torchrun:
                    raise InputError(f"{Path(sys.argv[0]).name} is one process; start it with python, not torchrun")
                main()
        leave_signals()
    except InputError as error:
        fail(str(error), error.details)
        code = 2
    except KeyboardInterrupt:
        fail("interrupted")
        code = 130
    except Terminated:
        fail("terminated")
        code = 143
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error))
        code = 1
    except Exception as error:
        code = 1
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
            fail("out of memory; lower --batch-size or --image-size")
        elif re.search(LOST_WORKER, str(error)):
            fail("a process that reads images was killed, perhaps for lack of memory or of /dev/shm; lower --workers")
        elif distributed.is_launched() and re.search(CONNECTION_LOST, str(error)):
            fail("another process of this run is gone, killed or out of memory")
        elif distributed.first_to_fail():
            raise
    leave_signals()
    sys.exit(code)


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value <= high if above else low <= value <= high) or value in (float("inf"),):
            bounds = f"above {low:g}" if above else f"at least {low:g}"
            bounds += f" and at most {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole' if kind is int else 'a'} number {bounds}")
        return value

    return parse


def some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of `names`, separated by commas, in their own order."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"'{unknown[0]}' is not one of {', '.join(names)}")
        return [name for name in names if name in chosen]

    return parse


def category_name(text: str) -> str:
    """An argparse type: a folder's plain name."""
    if not text or text.startswith(".") or re.search(r'[/\\:*?"<>|\x00-\x1f]', text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a folder's plain name (no separators, no leading dot)")
    return text


def add_data_flags(parser: Parser) -> None:
    """Where images are read from and results go."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-root", type=Path, default=Path("data"), help="holds <category>/train, test, ground_truth"
    )
    group.add_argument(
        "--category",
        type=category_name,
        nargs="+",
        default=["coal_ad"],
        help="folders in MVTec layout, or 'all'; only coal_ad is downloaded (default: coal_ad)",
    )
    group.add_argument("--results-dir", type=Path, default=Path("result"), help="default: result")


def add_fusion_flags(parser: Parser) -> None:
    """How the branches are fused; `check_fusion` and `settle_fusion` belong to them."""
    from models.fusion.usad import FUSIONS

    group = parser.add_argument_group("fusion")
    group.add_argument("--fusion", choices=FUSIONS, help="default: paper; with the demo network standardized")
    group.add_argument("--lambda-obj", type=number(float, 0), help="factor of MACLU's score (default: 0.01)")
    group.add_argument("--lambda-map", type=number(float, 0), help="factor of the fused map's maximum (default: 1)")


def check_fusion(args: argparse.Namespace) -> None:
    """Raise InputError where a factor is given that has no effect."""
    for flag in ("lambda_obj", "lambda_map"):
        if args.fusion == "standardized" and getattr(args, flag) is not None:
            raise InputError(f"--{flag.replace('_', '-')} has no effect with --fusion standardized; leave it out")


def settle_fusion(args: argparse.Namespace, folders: Iterable[Path]) -> None:
    """Fill in what was not given: the fusion that the checkpoints in `folders` call for, and the paper's factors."""
    from models.fusion.usad import default_fusion

    if args.fusion is None:
        fusions = {default_fusion(folder) for folder in folders}
        if len(fusions) > 1:
            raise InputError("some of the categories' checkpoints are of the demo network, some are not; give --fusion")
        (args.fusion,) = fusions
    check_fusion(args)
    args.lambda_obj = 0.01 if args.lambda_obj is None else args.lambda_obj
    args.lambda_map = 1.0 if args.lambda_map is None else args.lambda_map


def add_run_flags(parser: Parser) -> None:
    """How to run, and what to write."""
    group = add_loading_flags(parser)
    group.add_argument("--no-images", action="store_true", help="write no heat maps")
    group.add_argument("--save-maps", action="store_true", help="write the raw float32 maps as TIFF")


def add_loading_flags(parser: Parser) -> argparse._ArgumentGroup:
    """What the networks run on, and who reads the images; returns the group, for more flags."""
    group = add_device_flags(parser)
    group.add_argument(
        "--workers",
        type=number(int, 0, 256),
        help="processes that read images (default: 1 on a CPU, up to 8 on a GPU)",
    )
    return group


def add_skip_flag(parser: Parser) -> None:
    """What is done about images that cannot be read."""
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="look at all files first and leave out those that cannot be read; config.json lists them",
    )


def add_device_flags(parser: Parser) -> argparse._ArgumentGroup:
    """What the networks run on; returns the group, for more flags."""
    group = parser.add_argument_group("run")
    group.add_argument("--batch-size", type=number(int, 1), help="images at a time (default: 4 on a CPU, 32 on a GPU)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="auto: fp32 on a CPU, bf16 on a GPU that has it",
    )
    return group


def add_weights_flags(parser: Parser, branches: Iterable[type[Branch]]) -> None:
    """Where each branch's weights given as a file are now."""
    group = parser.add_argument_group("weights")
    for branch in branches:
        group.add_argument(branch.weights_flag, metavar="FILE", help=f"where the weights of {branch.name} are now")


def weights_by_branch(args: argparse.Namespace, branches: Iterable[type[Branch]]) -> dict[str, str | None]:
    """The values of those flags, by branch name."""
    return {branch.name: getattr(args, branch.weights_flag.removeprefix("--").replace("-", "_")) for branch in branches}


def choose_device(name: str, precision: str) -> str:
    """The device that `--device` stands for; also switches TF32 on where, and only where, it is asked for.

    Raises InputError for a device that is not there, or a precision that it does not have.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise InputError(f"--device {name} is not one of auto, cpu, cuda, cuda:0, cuda:1 and so on")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.size() > 1 and name.startswith("cuda"):
        name = distributed.own_gpu(name)
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


def settle_run(args: argparse.Namespace) -> str:
    """Choose the device; it, its batch size and its workers replace what the flags leave to the program."""
    args.device = choose_device(args.device, args.precision)
    args.batch_size = args.batch_size or default_batch_size(args.device)
    args.workers = default_workers(args.device) if args.workers is None else args.workers
    return args.device


def default_batch_size(device: str) -> int:
    return 32 if device.startswith("cuda") else 4


def default_workers(device: str) -> int:
    return min(8, max(1, (os.cpu_count() or 1) // distributed.local_size())) if device.startswith("cuda") else 1
