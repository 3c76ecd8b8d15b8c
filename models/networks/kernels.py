"""oneDNN's kernels on the CPU: linear layers, convolutions and attention, in float32 and bfloat16.

By default torch uses MKL for matrix products in float32, which can be half as fast on CPUs that are not Intel's, and
computes a convolution of one image on one thread without oneDNN.
"""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from timeit import timeit
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PROBE = 512, 384, 768  # rows, inputs and outputs of the layer that is timed, a few ms
TURNS = 9
MARGIN = 1.5
FEW_TOKENS = 128  # with fewer, a head's products are too small to be worth a call each
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value
_state = threading.local()


@contextlib.contextmanager
def torchs_own_kernels() -> Iterator[None]:
    """For the block, networks are built and products computed without oneDNN's kernels."""
    _state.plain = True
    try:
        yield
    finally:
        _state.plain = False


def onednn_gains(dtype: torch.dtype) -> bool:
    return not getattr(_state, "plain", False) and onednn_pays(dtype)


@functools.cache
def onednn_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels are right, and a linear layer with GELU is not clearly slower by them.

    Two runs on one machine must decide alike, or their numbers differ in the last digit. So torch's own kernels have to
    be faster by the factor MARGIN, in the best of several turns.
    """
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)  # so that the global random numbers are not touched
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((9, 64), (32, 64), (32,)))
    image, kernel = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((1, 64, 6, 6), (32, 64, 3, 3)))
    pairs = [
        (lambda: _linear(x, weight, bias), lambda: F.linear(x, weight, bias)),
        (
            lambda: _linear(x, torch.ops.mkldnn._reorder_linear_weight(weight), bias, "gelu"),
            lambda: F.gelu(F.linear(x, weight, bias)),
        ),
        (lambda: _conv2d(image, kernel, bias, 1, 1, 1, 1), lambda: F.conv2d(image, kernel, bias, 1, 1)),
    ]
    return all(is_right(*pair, TOLERANCE[dtype]) for pair in pairs) and _slowdown(dtype) < MARGIN


def is_right(kernel: Callable[[], Tensor], plain: Callable[[], Tensor], tolerance: float) -> bool:
    """Whether torch has the kernel, by its private name and in this precision, and it computes what `plain` does.

    The `tolerance` is a share of the largest value.
    """
    try:
        expected = plain()
        return bool((kernel() - expected).abs().max() <= tolerance * expected.abs().max())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _slowdown(dtype: torch.dtype) -> float:
    """Seconds that the layer takes by oneDNN, over those by torch's kernels."""
    rows, inputs, outputs = PROBE
    x, weight, bias = (torch.ones(*shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight)
    works = (lambda: _linear(x, reordered, bias, "gelu")), (lambda: F.gelu(F.linear(x, weight, bias)))
    turns = [[timeit(work, number=1) for work in works] for _ in range(TURNS)]
    ours, torchs = (min(side) for side in zip(*turns, strict=True))
    return ours / torchs


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of [..., D] and [m, D] (and [m]) -> [..., m], by the fastest kernel of this machine."""
    if x.device.type == "cpu" and onednn_gains(x.dtype):
        return _linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, activation, [], "none")


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    stride, padding, dilation = ([side] * 2 if isinstance(side, int) else side for side in (stride, padding, dilation))
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "none", [], "")


class GELULinear(nn.Module):
    """gelu(linear(x)) by one kernel. A ReLU has none: oneDNN's turns NaN into 0, which would hide a broken network."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias, "gelu")


class OneDNN(TorchFunctionMode, contextlib.ContextDecorator):
    """For the block, linear layers, convolutions, and attention without mask compute by oneDNN."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = any(isinstance(option, Tensor) or option for option in kwargs.values())  # mask, dropout, scale
        if function is F.linear and not given:
            return linear(*args)
        if function is F.conv2d and len(args) == 7 and not isinstance(args[4], str):  # as nn.Conv2d calls it
            return _conv2d(*args)
        plain = function is F.scaled_dot_product_attention and len(args) == 3 and not given
        if plain and args[0].shape[-2] >= FEW_TOKENS:
            return _attention(*args)
        return function(*args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for [B, H, N, d] each -> [B, H, N, d]; the scores and their softmax are float32.

    A thread takes one head of one image at a time: the scores [N, N] of a head then stay in the processor's cache, and
    threads synchronise once a layer.
    """
    images, heads, count, width = query.shape
    result = query.new_empty(images, count, heads, value.shape[-1])  # the order in which the next layer reads it

    def attend(head: tuple[int, int]) -> None:
        image, number = head
        with torch.inference_mode():  # each thread has modes of its own
            scores = linear(query[head].float(), key[head].float() * width**-0.5)
            torch._softmax(scores, -1, False, out=scores)
            result[image, :, number] = linear(scores.to(value.dtype), value[head].mT)

    every = list(itertools.product(range(images), range(heads)))
    threads = min(torch.get_num_threads(), len(every))
    list(_single_threads(threads).map(attend, every) if threads > 1 else map(attend, every))
    return result.transpose(1, 2)


@functools.cache
def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads; on each of them torch uses no others."""
    outside = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "attention", torch.set_num_threads, (1,))
    started = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(outside)  # the pool's threads keep their setting; threads started later get this one
    return pool
