"""Command lines: shared flags with their ranges, one-line errors, exit codes."""

import argparse
import atexit
import contextlib
import difflib
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import NoReturn

from utils import distributed
from utils.errors import InputError
from utils.packages import check_packages
from utils.safe_text import redact
from utils.signals import Terminated, leave_signals, stopped_by, watch_signals

OUT_OF_MEMORY = "out of memory|can't allocate memory"  # what torch says of a GPU's, and of a CPU's
CONNECTION_LOST = "[Cc]onnection (closed|reset)"  # what gloo and NCCL say when another process is gone
LOST_WORKER = r"DataLoader worker .* (killed by signal|exited unexpectedly)|unable to .* (shared memory|</?torch_)"
_warned: set[Hashable] = set()  # the keys of `warn_once`


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
            close = difflib.get_close_matches(flag, self.flags(), 1)
            hint = f"did you mean {close[0]}? " if close else ""
            self.error(f"unknown argument {flag}: {hint}{self.prog} --help lists what this script takes")
        return parsed

    def flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (one that begins with - is written --flag=-1e-3)"
        raise InputError(f"{self.prog}: {message}")


def warn(message: str) -> None:
    _say(f"warning: {message}")


def warn_once(key: Hashable, message: str) -> None:
    """Print a warning unless one with the same `key` has been printed in this run."""
    if key not in _warned:
        _warned.add(key)
        warn(message)


def _say(message: str) -> None:
    """Print one line on stderr, without any camera's password."""
    print(redact(" ".join(message.split())), file=sys.stderr)


def run(main: Callable[[], None], torchrun: bool = False) -> NoReturn:
    """Run a script, which may be one for `torchrun`; exit with 0, 2 (bad input), 130 or 143 (a signal), or 1 (else)."""
    _open_closed_streams()
    watch_signals()
    atexit.register(gc.freeze)  # to look for garbage among PyTorch's million objects at the end takes most of a second
    _warned.clear()
    with contextlib.suppress(AttributeError):  # not a file
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    code, reason, details = 0, None, ()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: warn(str(message))
            check_packages()
            with distributed.processes():
                if distributed.size() > 1 and not torchrun:
                    raise InputError(f"{Path(sys.argv[0]).name} is one process; start it with python, not torchrun")
                main()
        leave_signals()
    except InputError as error:
        code, reason, details = 2, str(error), error.details
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
    except Terminated:
        code, reason = 143, "terminated"
    except OSError as error:
        code, reason = 1, f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    except Exception as error:
        code = 1
        if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
            reason = "out of memory; lower --batch-size or --image-size"
        elif (number := stopped_by()) and (re.search(LOST_WORKER, str(error)) or _is_of_a_signal(error)):
            code, reason = 128 + number, "interrupted" if number == signal.SIGINT else "terminated"
        elif re.search(LOST_WORKER, str(error)):
            reason = (
                "a process that reads images was killed, perhaps for lack of memory or of /dev/shm; lower --workers"
            )
        elif distributed.is_launched() and re.search(CONNECTION_LOST, str(error)):
            reason = "another process of this run is gone, killed or out of memory"
        elif distributed.first_to_fail():
            leave_signals()  # the traceback keeps the workers, and their end would be awaited
            raise
    if reason is not None and distributed.first_to_fail():  # of several processes one says why
        for line in (*details, f"error: {reason}"):
            _say(line)
    leave_signals()
    sys.exit(code)


def _is_of_a_signal(error: BaseException | None) -> bool:
    """Whether the error was made of a signal's, as Python before 3.12 does while a class is made."""
    while error and not isinstance(error, KeyboardInterrupt | Terminated):
        error = error.__cause__ or error.__context__
    return error is not None


def _open_closed_streams() -> None:
    """Have closed streams (`2>&-`) lead nowhere: else the next file that is opened gets the messages of C libraries."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  it stays open


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite int or float in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value <= high if above else low <= value <= high) or abs(value) == float("inf"):
            bounds = (f" above {low:g}" if above else f" at least {low:g}") if low > float("-inf") else ""
            bounds += f" and at most {high:g}" if high < float("inf") else ""
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole' if kind is int else 'a'} number{bounds}")
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


def add_size_flag(group: argparse._ArgumentGroup, default: float) -> None:
    """How large an image file may be."""
    group.add_argument(
        "--max-megapixels",
        type=number(float, 0, above=True),
        default=default,
        metavar="N",
        help="refuse image files that are larger and could fill the memory; JPEG is reduced to it "
        f"(default: {default:g})",
    )


def category_name(text: str) -> str:
    """An argparse type: a folder's plain name."""
    if not text or text.startswith(".") or re.search(r'[/\\:*?"<>|\x00-\x1f]', text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a folder's plain name (no separators, no leading dot)")
    return text
