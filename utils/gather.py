"""Moves tensors between the processes of a run.

What a pass over images gathers is held by accumulators: objects with `state()`, a dictionary of tensors, and
`merge(state)`. `collect` merges them on the main process; `from_first` sends what that made of them to all processes.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import gathered, is_main_process, local_rank, local_size, size
from utils.errors import InputError
from utils.files import digest_of_lines

State = Mapping[str, "Tensor | np.ndarray"]


class Accumulator(Protocol):
    """Something gathered from images that can be merged with the same from other images."""

    def state(self) -> State: ...

    def merge(self, state: State) -> None: ...


def collect(*accumulators: Accumulator) -> bool:
    """Merge the accumulators of all processes, in rank order, into the main one's; whether this is the main one."""
    for accumulator in accumulators:
        if not is_main_process():
            _transfer(accumulator.state(), partial(dist.send, dst=0))
            continue
        for source in range(1, size()):
            accumulator.merge(_transfer(None, partial(dist.recv, src=source)))
    return is_main_process()


def from_first(compute: Callable[[], State]) -> State:
    """Call `compute` on the main process alone, and return its tensors on every process."""
    state = compute() if is_main_process() else None
    return state if size() == 1 else _transfer(state, partial(dist.broadcast, src=0))


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


def _transfer(state: State | None, move: Callable[[Tensor], object]) -> dict[str, Tensor]:
    """Send `state`, or receive one if it is None: `move` sends a tensor or fills it.

    A description of the tensors goes first, by gloo. Processes wait there, so that NCCL starts when both are ready.
    """
    receiving = state is None
    tensors = {name: torch.as_tensor(value) for name, value in (state or {}).items()}
    layout = [(name, str(tensor.dtype), tensor.shape, tensor.device.type) for name, tensor in tensors.items()]
    header = torch.frombuffer(bytearray(json.dumps(layout).encode()), dtype=torch.uint8)
    length = torch.tensor([len(header)])
    move(length)
    if receiving:
        header = torch.empty(int(length), dtype=torch.uint8)
    move(header)
    for name, dtype, shape, device in json.loads(header.numpy().tobytes()):
        if receiving:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
        if tensors[name].numel():
            move(tensors[name].detach().contiguous().view(-1).view(torch.uint8))
    return tensors
