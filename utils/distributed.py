"""The processes that share a run, on one machine or many: torchrun starts them, and one alone is the same run.

This half knows who is who and needs no PyTorch while there is one process; utils/gather.py moves tensors.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

PATIENCE = datetime.timedelta(days=7)  # the others wait while the main process selects, which may take hours
FAILURES = "usad/failures"

_store: Any = None  # torchrun's own key-value store, where there are several processes


class Abandoned(Exception):
    """Another process of the run has failed, and has said why."""


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Within it the processes that torchrun started know each other; all but the first print nothing.

    Tensors on GPUs travel by NCCL, all others by gloo.
    """
    global _store
    if not is_launched():
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    _store = store
    with contextlib.ExitStack() as stack:
        if not is_main_process():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()
    _store = None


def size() -> int:
    """The number of processes."""
    return int(os.environ["WORLD_SIZE"]) if _store is not None else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ["RANK"]) if _store is not None else 0


def is_main_process() -> bool:
    """Whether this is the process that selects, speaks and writes."""
    return rank() == 0


def local_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _store is not None else 1


def local_rank() -> int:
    """This process's number among those of its machine, from 0."""
    return int(os.environ["LOCAL_RANK"]) if _store is not None else 0


def shard(count: int, batch_size: int) -> range:
    """This process's share of `count` images: contiguous, and whole batches of those that one process would form.

    So every number comes out of the very batch that it would come out of there, and does not depend on the processes.
    """
    batches = -(-count // batch_size)
    start, stop = (-(-batches * part // size()) * batch_size for part in (rank(), rank() + 1))
    return range(min(start, count), min(stop, count))


def check() -> None:
    """Raise Abandoned where another process has failed."""
    if _store is not None and _store.check([FAILURES]):
        raise Abandoned


def first_to_fail() -> bool:
    """Whether this process is the first of its run to fail, which alone says why; to be asked once."""
    try:
        return _store is None or _store.add(FAILURES, 1) == 1
    except RuntimeError:  # the store has gone away with the process that kept it
        return False
