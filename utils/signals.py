"""SIGINT and SIGTERM: a run ends after the current batch, or after a few seconds wherever it is."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

GRACE = 4.0  # seconds that the current batch gets to finish
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM arrived."""


class _Script:
    """What the handler knows of the running script."""

    process: int | None = None  # the process that may stop the run; a loader's workers inherit the handler
    loops = 0  # over batches, running now
    asked: int | None = None  # the signal that waits for the current batch
    stopped_by: int | None = None  # the signal that ended the run


def watch_signals() -> None:
    """Have SIGINT raise KeyboardInterrupt and SIGTERM raise Terminated; inside `stoppable` after the current batch."""
    _Script.process, _Script.loops, _Script.asked, _Script.stopped_by = os.getpid(), 0, None, None
    _handle(_on_signal)


def leave_signals() -> None:
    """The run is over: from here on a signal ends the process silently, and its workers at the next SIGTERM."""
    _set_alarm(0)
    _handle(signal.SIG_DFL)
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for a worker that ends
    for worker in workers:
        worker.terminate()


def _handle(handler) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in SIGNALS:
            signal.signal(number, handler)


def leave_signals_to_parent() -> None:
    """For a worker process, which signals reach, too: the script decides, and ends it by a second SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def stoppable(batches: Iterable) -> Iterator[Any]:
    """Yield `batches`; a signal takes effect between two of them, or after GRACE seconds."""
    _Script.loops += 1
    try:
        for batch in batches:
            _stop_if_asked()
            yield batch
            _stop_if_asked()
    finally:
        _Script.loops -= 1


def stopped_by() -> int | None:
    """The signal that ended the run, or that was about to, if there was one."""
    return _Script.stopped_by or _Script.asked


def _on_signal(number: int, frame: object) -> None:
    if os.getpid() != _Script.process:
        leave_signals_to_parent()
    elif _Script.loops == 0 or _Script.asked is not None or not _set_alarm(GRACE):
        _stop(number)
    else:
        _Script.asked = number


def _set_alarm(seconds: float) -> bool:
    """Stop the run after `seconds` (0: never); False if the system has no such timer (Windows)."""
    if not hasattr(signal, "setitimer"):
        return False
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGALRM, lambda *_: _stop_if_asked())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return True


def _stop_if_asked() -> None:
    if _Script.asked is not None:
        _stop(_Script.asked)


def _stop(number: int) -> NoReturn:
    _set_alarm(0)
    _Script.asked, _Script.stopped_by = None, number
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
