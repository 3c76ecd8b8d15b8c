"""NVIDIA GPUs: activations computed in the kernel of the layer before them."""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.networks.folding import fuse_gelus, fuse_relus
from models.networks.kernels import is_right

TOLERANCE = 2e-2  # of the largest value: half precision, and GELU by its tanh formula


def use_cuda_kernels(net: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The network; its convolutions and linear layers also compute the ReLU or GELU that follows them.

    cuBLAS has GELU by the tanh formula, for half precision only. cuDNN's ReLU may turn NaN into 0, so it is not used in
    fp16, whose range an unusual image may exceed.
    """
    if dtype != torch.float16 and fused_convolutions_work(dtype, device):
        net = fuse_relus(net, FusedConv2d)
    if dtype != torch.float32 and fused_gelu_works(dtype, device):
        fuse_gelus(net, GELULinear)
    return net


class FusedConv2d(nn.Module):
    """relu(conv(x)) or relu(conv(x) + added) by one kernel of cuDNN."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        if added is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, added, 1.0, self.bias, *self.geometry)


class GELULinear(nn.Module):
    """gelu(linear(x)) by one kernel of cuBLAS."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        result = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.mT, use_gelu=True)
        return result.unflatten(0, x.shape[:-1])


@cache
def fused_gelu_works(dtype: torch.dtype, device: torch.device) -> bool:
    layer = nn.Linear(64, 128, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 16, 64, device=device, dtype=dtype)
    return is_right(partial(GELULinear(layer), x), lambda: F.gelu(layer(x)), TOLERANCE)


@cache
def fused_convolutions_work(dtype: torch.dtype, device: torch.device) -> bool:
    conv = nn.Conv2d(64, 64, 3, padding=1, device=device, dtype=dtype).requires_grad_(False)
    conv = conv.to(memory_format=torch.channels_last)
    x, added = (torch.randn(2, 64, 8, 8, device=device, dtype=dtype) for _ in range(2))
    x, added = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, added))
    fused = FusedConv2d(conv)
    pairs = [
        (partial(fused, x), lambda: conv(x).relu()),
        (partial(fused, x, added), lambda: (conv(x) + added).relu()),
    ]
    return all(is_right(*pair, TOLERANCE) for pair in pairs)
