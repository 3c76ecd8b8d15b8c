"""The same numbers faster: batch norms folded into convolutions, and oneDNN's kernels on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval


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


def use_onednn(net: nn.Module, image_size: int) -> None:
    """Give linear layers and convolutions oneDNN's 32-bit kernels, in place; nothing on CPUs without AVX-512.

    Left alone, torch takes MKL for linear layers, and on a single thread for many convolutions: on CPUs that
    are not Intel's it leaves AVX-512 unused and is half as fast.
    """
    kernels = ("_linear_pointwise", "_convolution_pointwise", "_reorder_linear_weight")
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    if not all(hasattr(torch.ops.mkldnn, kernel) for kernel in kernels):  # private names
        return
    for path in _called_layers(net, image_size):
        module = net.get_submodule(path)
        if type(module) is nn.Linear:
            net.set_submodule(path, OneDNNLinear(module))
        elif module.padding_mode == "zeros":
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
    """nn.Linear with weights in the order in which oneDNN reads them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


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
