"""The same numbers faster: batch norms folded into convolutions, and oneDNN's kernels on the CPU.

Left alone, torch takes MKL for matrix products, and on a single thread for many convolutions: on CPUs that are
not Intel's it leaves AVX-512 unused and is half as fast.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode


def fold_batch_norms(net: nn.Module) -> None:
    """Fold each batch norm that alone follows a convolution into that convolution's weights, in place.

    A network whose forward cannot be traced is left as it is.
    """
    if not any(type(module) is nn.BatchNorm2d for module in net.modules()):
        return
    try:
        graph = fx.symbolic_trace(net).graph
    except Exception:  # control flow that depends on values: tracing may fail in any way, and nothing is lost
        return
    modules = dict(net.named_modules())
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or type(modules[before.target]) is not nn.Conv2d or len(before.users) > 1:
            continue
        net.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target]))
        net.set_submodule(node.target, nn.Identity())


@functools.cache
def onednn_available() -> bool:
    """Whether this CPU gains by oneDNN's 32-bit kernels, and this torch has them under their private names."""
    kernels = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and all(hasattr(torch.ops.mkldnn, kernel) for kernel in kernels)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of matrices [n, D] and [m, D] (and [m]) -> [n, m], by the fastest kernel there is."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and onednn_available():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return F.linear(x, weight, bias)


def use_onednn(net: nn.Module, image_size: int) -> None:
    """Give linear layers and convolutions oneDNN's kernels, in place; a GELU is computed with the layer before it."""
    called = _called_layers(net, image_size)
    for module in list(net.modules()):
        if type(module) is Mlp and type(module.act) is nn.GELU and module.act.approximate == "none":
            module.act = nn.Identity()
            module.fc1 = OneDNNLinear(module.fc1, "gelu")
    for path in called:
        module = net.get_submodule(path)
        if type(module) is nn.Linear:
            net.set_submodule(path, OneDNNLinear(module))
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
            net.set_submodule(path, OneDNNConv2d(module))


def _called_layers(net: nn.Module, image_size: int) -> list[str]:
    """Paths of the linear layers and convolutions that a pass calls, found without computing anything.

    Where another module reads a layer's weights instead of calling it, the layer must stay what it is.
    """
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, path=path: called.append(path))
        for path, module in net.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
    ]
    tensors = {name: tensor.to("meta") for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    try:
        functional_call(net, tensors, torch.empty(1, 3, image_size, image_size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


class OneDNNLinear(nn.Module):
    """nn.Linear, and an activation if wished, with weights in the order in which oneDNN reads them."""

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "none")


class OneDNNConv2d(nn.Module):
    """nn.Conv2d by oneDNN on any number of threads.

    Its weights stay in torch's order: oneDNN's depends on the batch size, and the wrong one halves the speed.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")


class OneDNNAttention(TorchFunctionMode):
    """Within it, attention without mask multiplies by oneDNN, a thread taking one head of one image at a time.

    A head's scores [N, N] then stay in the processor's cache, and threads meet once for a layer.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = any(isinstance(option, Tensor) or option for option in kwargs.values())  # mask, dropout, scale
        if function is F.scaled_dot_product_attention and len(args) == 3 and not given:
            return _attention(*args)
        return function(*args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for [B, H, N, d] each -> [B, H, N, d]."""
    images, heads, count, width = query.shape
    result = query.new_empty(images, count, heads, value.shape[-1])  # the order in which the next layer reads it

    def attend(head: tuple[int, int]) -> None:
        image, number = head
        with torch.inference_mode():  # modes are a thread's own
            scores = linear(query[head], key[head] * width**-0.5)
            torch._softmax(scores, -1, False, out=scores)
            result[image, :, number] = linear(scores, value[head].mT)

    every = list(itertools.product(range(images), range(heads)))
    threads = min(torch.get_num_threads(), len(every))
    list(_single_threads(threads).map(attend, every) if threads > 1 else map(attend, every))
    return result.transpose(1, 2)


@functools.cache
def _single_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads on each of which torch uses no further ones."""
    outside = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "attention", torch.set_num_threads, (1,))
    started = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(outside)  # the pool's threads keep theirs; those started later get it
    return pool
