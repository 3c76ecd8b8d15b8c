"""The same numbers faster: batch norms folded into convolutions, weights packed for the CPU's own instructions."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
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
        if (
            before.op != "call_module"
            or type(modules[before.target]) is not nn.Conv2d
            or len(before.users) > 1
        ):
            continue
        net.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], modules[node.target]))
        net.set_submodule(node.target, nn.Identity())


def pack_for_cpu(net: nn.Module, called: set[str]) -> None:
    """Replace the linear layers and convolutions in `called` by ones whose weights oneDNN has packed, in place.

    torch's own linear layers go through MKL, which on CPUs other than Intel's leaves AVX-512 unused; and a
    convolution packs its weights anew in every pass. Only 32-bit floats on CPUs with AVX-512; elsewhere a no-op.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return
    for path, module in list(net.named_modules()):
        if path in called and type(module) is nn.Linear:
            net.set_submodule(path, PackedLinear(module))
        elif (
            path in called
            and type(module) is nn.Conv2d
            and module.groups == 1
            and module.padding_mode == "zeros"
        ):
            net.set_submodule(path, PackedConv2d(module))


class PackedLinear(nn.Module):
    """nn.Linear by oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedConv2d(nn.Module):
    """nn.Conv2d by oneDNN, for inputs whose channels lie last."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry)
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, "none", [], ""
        )
