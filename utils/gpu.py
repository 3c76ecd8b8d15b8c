"""Work on a GPU that does not wait for Python: passes replayed as CUDA graphs, works on streams of their own."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from utils.timing import Lap, Stopwatch

MOST_GRAPHS = 4  # batch sizes for which a pass is captured; each holds the memory of its outputs


class Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph  # replaying it reads `inputs` and overwrites `outputs`
    inputs: Tensor
    outputs: Any
    laps: list[list[Lap]]  # by stopwatch


class CapturedPasses:
    """A function of a batch on a GPU, replayed as a CUDA graph: one launch, and no kernel waits for Python.

    A batch size is captured when it occurs for the second time; the first lets cuDNN choose its algorithms. A smaller
    batch of more than half that size is filled up, so the last one needs no graph of its own. What cannot be captured
    runs as usual. `compute` may keep its times with `stopwatches`; all it reads beside its argument stays where and
    what it is.
    """

    def __init__(self, compute: Callable[[Tensor], Any], stopwatches: Collection[Stopwatch] = ()) -> None:
        self.compute = compute
        self.stopwatches = stopwatches
        self.seen: set[int] = set()
        self.graphs: dict[int, Graph] = {}
        self.obstacle: str | None = None  # why the function cannot be captured
        self.pool: tuple[int, int] | None = None  # the memory of all its graphs; it must not outlive the last of them

    def __call__(self, batch: Tensor) -> Any:
        """A batch [B, ...], of one shape but for B -> what the function gives: tensors [B, ...], nested at will."""
        if _capturing():  # as part of a larger pass
            return self.compute(batch)
        count = len(batch)
        size = min((size for size in self.graphs if count <= size < 2 * count), default=None)
        if size is None:
            if count not in self.seen or self.obstacle or len(self.graphs) == MOST_GRAPHS:
                self.seen.add(count)
                return self.compute(batch)
            try:
                self.graphs[count] = self._capture(batch)
            except RuntimeError as error:  # it asks the host for something
                self.obstacle = str(error)
                return self.compute(batch)
            size = count
        captured = self.graphs[size]
        captured.inputs[:count].copy_(batch)
        self._settle()
        captured.graph.replay()
        for stopwatch, laps in zip(self.stopwatches, captured.laps, strict=True):
            stopwatch.laps += laps
        return tree_map_only(Tensor, lambda output: output[:count].clone(), captured.outputs)

    def _settle(self) -> None:
        """Have the stopwatches read the time stamps that a replay would overwrite."""
        for stopwatch in self.stopwatches:
            stopwatch.settle()

    def _capture(self, batch: Tensor) -> Graph:
        self._settle()
        graph, inputs = torch.cuda.CUDAGraph(), batch.clone()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # Only this thread's calls are captured: the loader's pinning thread works on meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = self.compute(inputs)
        finally:  # nothing has run yet that the laps could tell the time of
            laps = [stopwatch.laps.copy() for stopwatch in self.stopwatches]
            for stopwatch in self.stopwatches:
                stopwatch.laps.clear()
        return Graph(graph, inputs, outputs, laps)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def side_by_side(works: Sequence[Callable[[], Any]], device: torch.device) -> list[Any]:
    """The results of `works`: in a capture on a stream each, elsewhere in turn, for graphs share cuBLAS's workspace."""
    if not _capturing():
        return [work() for work in works]
    here, results = torch.cuda.current_stream(device), []
    streams = [_stream(device, number) for number in range(len(works))]
    for stream, work in zip(streams, works, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(work())
    for stream in streams:
        here.wait_stream(stream)
    return results


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class ReadBack:
    """Tensors, nested at will, on their way from a GPU to the host; the GPU goes on computing meanwhile."""

    def __init__(self, tensors: Any, device: torch.device) -> None:
        self.source = tensors  # their memory must not be used anew before they are copied
        stream = _stream(device, -1)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.copies = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", non_blocking=True), tensors)
            self.done = torch.cuda.Event()
            self.done.record()

    def wait(self) -> Any:
        self.done.synchronize()
        self.source = None
        return self.copies
