"""One run at a time writes to a folder or a file."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from utils import distributed
from utils.errors import InputError
from utils.files import leftovers
from utils.signals import Terminated


def folder_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep others out of `folder`, and remove what a killed run left; raises InputError for a live one."""
    return _lock(folder / ".lock", folder, lambda: leftovers(folder.rglob("*")))


def file_lock(path: Path) -> contextlib.AbstractContextManager[None]:
    """The same for one file, or for a folder that is replaced as a whole."""
    return _lock(path.with_name(f".{path.name}.lock"), path, lambda: leftovers(path.parent.iterdir(), of=path))


@contextlib.contextmanager
def _lock(lock_path: Path, target: Path, unfinished: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Hold the lock; afterwards its file is gone, and so is a folder made only for it.

    Of several processes only the main one locks: it alone writes. The system releases the lock of a killed one.
    """
    if not distributed.is_main_process():
        yield
        return
    made = [folder for folder in lock_path.parents if not folder.exists()]
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=0)
        while not lock_path.exists():  # its last holder has just removed it
            lock.release()
            lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another run is writing to {target}; wait for its end, or choose another folder") from None
    try:
        for path in unfinished():
            path.unlink(missing_ok=True)
        yield
    finally:
        try:
            _leave(lock, made)
        except (KeyboardInterrupt, Terminated):  # a signal while a run that has failed tidies up
            _leave(lock, made)
            raise


def _leave(lock: FileLock, made: Iterable[Path]) -> None:
    with contextlib.suppress(PermissionError):  # Windows cannot remove an open file; FileLock does it there
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
    with contextlib.suppress(OSError):  # not empty
        for folder in made:
            folder.rmdir()
