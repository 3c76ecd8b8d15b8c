"""oneDNN's kernels on the CPU: linear layers, convolutions and attention, in float32 and bfloat16.

By default torch uses MKL for matrix products in float32, which can be half as fast on CPUs that are not Intel's.
Whether oneDNN is clearly slower is measured once, on the machine that runs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from models.networks.folding import gelu_mlps

PROBE = 512, 384, 768  # rows, inputs and outputs of the layer that is timed, a few ms
TURNS = 9
MARGIN = 1.5
FEW_TOKENS = 128  # with fewer, a head's products are too small to be worth a call each
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest value

_called: dict[tuple, list[str]] = {}  # paths of layers, by network
_state = threading.local()


@contextlib.contextmanager
def torchs_own_kernels() -> Iterator[None]:
    """For the block, networks that are built and products that are computed do without oneDNN's kernels."""
    _state.plain = True
    try:
        yield
    finally:
        _state.plain = False


def onednn_gains(dtype: torch.dtype) -> bool:
    """Whether to compute by oneDNN's kernels."""
    return not getattr(_state, "plain", False) and onednn_pays(dtype)


@functools.cache
def onednn_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels are right, and a linear layer with GELU is not clearly slower by them.

    Two runs on one machine must decide alike, or their numbers differ in the last digit. So torch's own kernels have to
    be faster by the factor MARGIN, in the best of several turns. torch has oneDNN's under private names: if they are
    missing or take other arguments, the answer is no.
    """
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    try:
        return _onednn_is_right(dtype) and _slowdown(dtype) < MARGIN
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn_is_right(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):  # so that the global random numbers are not touched
        modules = nn.Linear(64, 32, dtype=dtype), nn.Conv2d(4, 8, 3, padding=1, dtype=dtype)
    layer, conv = (module.requires_grad_(False).to_empty(device="cpu") for module in modules)
    for parameter in (*layer.parameters(), *conv.parameters()):
        parameter.normal_(generator=generator)
    x, image = (torch.randn(shape, generator=generator).to(dtype) for shape in ((9, 64), (1, 4, 6, 6)))
    pairs = [
        (OneDNNLinear(layer)(x), layer(x)),
        (OneDNNLinear(layer, "gelu")(x), F.gelu(layer(x))),
        (OneDNNConv2d(conv)(image), conv(image)),
    ]
    return all((one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max() for one, other in pairs)


def _slowdown(dtype: torch.dtype) -> float:
    """Seconds that the layer takes by oneDNN, over those by torch's kernels."""
    rows, inputs, outputs = PROBE
    layer = nn.Linear(inputs, outputs, device="meta", dtype=dtype).to_empty(device="cpu").requires_grad_(False)
    for parameter in layer.parameters():
        parameter.fill_(0.1)
    x, fused = torch.ones(rows, inputs, dtype=dtype), OneDNNLinear(layer, "gelu")
    turns = [(_seconds(lambda: fused(x)), _seconds(lambda: F.gelu(layer(x)))) for _ in range(TURNS)]
    ours, torchs = (min(side) for side in zip(*turns, strict=True))
    return ours / torchs


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of matrices [n, D] and [m, D] (and [m]) -> [n, m], by the fastest kernel of this machine."""
    if x.device.type == "cpu" and onednn_gains(x.dtype):
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_onednn(backbone: nn.Module, image: Tensor) -> None:
    """Give a backbone's layers oneDNN's kernels, in place; a GELU is computed with the layer before it.

    A ReLU is not: oneDNN's turns NaN into 0, and a broken network would look sound. `image` [1, 3, S, S], on the meta
    device, is an input of the backbone.
    """
    network = type(backbone), backbone.spec.name, backbone.spec.image_size
    if network not in _called:
        _called[network] = _called_layers(backbone, image)
    for module in gelu_mlps(backbone):
        if module.act.approximate == "none":
            module.act = nn.Identity()
            module.fc1 = OneDNNLinear(module.fc1, "gelu")
    for path in _called[network]:
        module = backbone.get_submodule(path)
        if type(module) is nn.Linear:
            backbone.set_submodule(path, OneDNNLinear(module))
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
            backbone.set_submodule(path, OneDNNConv2d(module))


def _called_layers(net: nn.Module, image: Tensor) -> list[str]:
    """Paths of the linear layers and convolutions that a pass calls, found without computing anything.

    A layer whose weights another module reads without calling it must stay as it is.
    """
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: called.append(path))
        for path, module in net.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
    ]
    tensors = {name: tensor.to("meta") for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    try:
        functional_call(net, tensors, image)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


class OneDNNLinear(nn.Module):
    """nn.Linear with an optional activation, its weights in the order in which oneDNN reads them."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")


class OneDNNConv2d(nn.Module):
    """nn.Conv2d by oneDNN on any number of threads.

    Its weights stay in torch's order: oneDNN's own order depends on the batch size, and the wrong one halves the speed.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")


class OneDNNAttention(TorchFunctionMode):
    """For the block, attention without mask multiplies by oneDNN; a thread takes one head of one image at a time.

    The scores [N, N] of a head then stay in the processor's cache, and threads synchronise once a layer.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = any(isinstance(option, Tensor) or option for option in kwargs.values())  # mask, dropout, scale
        plain = function is F.scaled_dot_product_attention and len(args) == 3 and not given
        if plain and args[0].shape[-2] >= FEW_TOKENS:
            return _attention(*args)
        return function(*args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for [B, H, N, d] each -> [B, H, N, d]; the scores and their softmax are float32."""
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
