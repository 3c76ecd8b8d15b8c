"""The processes of torchrun that share a run: which is which. Needs no PyTorch for a single one."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

PATIENCE = datetime.timedelta(days=7)  # the others wait while the main process selects, which may take hours
FAILURES = "usad/failures"

_store: Any = None  # torchrun's own key-value store, where there are several processes


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Connects the processes that torchrun started for as long as the block runs; only the main one prints."""
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
    return int(os.environ["WORLD_SIZE"]) if _store is not None else 1


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if _store is not None else 0


def is_main_process() -> bool:
    """Whether this process is the one that selects, prints and writes."""
    return rank() == 0


def local_size() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _store is not None else 1


def local_rank() -> int:
    return int(os.environ["LOCAL_RANK"]) if _store is not None else 0


def shard(count: int, batch_size: int) -> range:
    """This process's share of `count` images, in the batches of a single process: so numbers stay the same."""
    batches = -(-count // batch_size)
    start, stop = (-(-batches * part // size()) * batch_size for part in (rank(), rank() + 1))
    return range(min(start, count), min(stop, count))


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in rank order, on every process; for small data on the CPU."""
    values = [value] * size()
    if size() > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def check() -> None:
    """Raise RuntimeError where another process has failed; that one prints why."""
    if _store is not None and _store.check([FAILURES]):
        raise RuntimeError("another process has failed")


def first_to_fail() -> bool:
    """Whether this process is the first of its run to fail, the one that prints why; call it once."""
    try:
        return _store is None or _store.add(FAILURES, 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        return False
