"""Moves tensors between the processes of a run.

What a pass over images gathers is held by accumulators: objects with `state()`, a dictionary of tensors, and
`merge(state)`, which takes in that of another. `collect` brings them to the main process, `from_first` sends from it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import gathered, is_main_process, local_rank, local_size, size
from utils.errors import InputError
from utils.files import digest_of_lines

State = Mapping[str, Tensor | np.ndarray]


def collect(*accumulators: Any) -> bool:
    """Merge the accumulators of all processes, in rank order, into the main one's; whether this is the main one."""
    for accumulator in accumulators:
        if not is_main_process():
            _transfer(accumulator.state(), dist.send_object_list, dist.send, dst=0)
            continue
        for source in range(1, size()):
            accumulator.merge(_transfer(None, dist.recv_object_list, dist.recv, src=source))
    return is_main_process()


def from_first(compute: Callable[[], State]) -> State:
    """Call `compute` on the main process alone, and return its tensors on every process."""
    state = compute() if is_main_process() else None
    return state if size() == 1 else _transfer(state, dist.broadcast_object_list, dist.broadcast, src=0)


def all_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, in rank order, on every process."""
    return torch.cat(gathered(rows))


def require_same(what: str, lines: Callable[[], Iterable[str]]) -> None:
    """Raise InputError if the processes do not have the same `lines`, for instance because machines' copies differ."""
    if size() > 1 and len(set(gathered(digest_of_lines(lines())))) > 1:
        raise InputError(f"the machines do not have the same {what}; share one disk, or copy it to all of them")


@contextlib.contextmanager
def one_per_machine_first() -> Iterator[None]:
    """One process of each machine runs the block first and downloads what it needs; the others then find it there."""
    if local_rank() > 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def barrier() -> None:
    """Wait until all processes have called this."""
    gathered(None)


def own_gpu(name: str) -> str:
    """The GPU of this process if `--device` asks for GPUs; raises InputError if there is not one for each process."""
    gpus = torch.cuda.device_count()
    if name != "cuda":
        raise InputError(f"--device {name} is one GPU for {local_size()} processes; use auto, which gives each its own")
    if local_size() > gpus:
        raise InputError(
            f"{local_size()} processes for {gpus} GPUs here; lower torchrun's --nproc-per-node or use --device cpu"
        )
    torch.cuda.set_device(local_rank())
    return f"cuda:{local_rank()}"


def _transfer(state: State | None, move_objects: Callable, move: Callable, **where: int) -> dict[str, Tensor]:
    """Send `state`, or receive one if it is None: the functions send what they are given, or fill it.

    A description of the tensors goes first, by gloo. Processes wait there, so that NCCL starts when both are ready.
    """
    tensors = {name: torch.as_tensor(value) for name, value in (state or {}).items()}
    layout = [[(name, tensor.dtype, tensor.shape, tensor.device.type) for name, tensor in tensors.items()]]
    move_objects(layout, **where)
    for name, dtype, shape, device in layout[0]:
        if state is None:
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        if tensors[name].numel():
            move(tensors[name].detach().contiguous().view(-1).view(torch.uint8), **where)
    return tensors
