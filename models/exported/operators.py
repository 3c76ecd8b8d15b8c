"""What ONNX has no operator for, by those that it has."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TAIL_DEGREE, TAIL_CENTER = 20, 3.0  # of the polynomial in `log_ndtr`: relative error under 1e-12


def resize_antialiased(images: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, antialiased resize [B, C, H, W] -> [B, C, *size]: a product with a matrix for each side."""
    rows, columns = (_resizing(side, to).to(images) for side, to in zip(images.shape[-2:], size, strict=True))
    return rows @ images @ columns.mT


def _resizing(side: int, to: int) -> Tensor:
    """The matrix [to, side] that resizes a column: triangles at the larger pixels' centres, in float32 as torch's."""
    scale, half = np.float32(side / to), np.float32(0.5)
    centers = scale * (np.arange(to, dtype=np.float32)[:, None] + half)
    reach = np.abs(np.arange(side, dtype=np.float32) - centers + half) * (1 / max(scale, np.float32(1)))
    weights = (1 - reach).clip(0)
    return torch.from_numpy(weights / weights.sum(1, keepdims=True))


def log_ndtr(x: Tensor) -> Tensor:
    """log Φ(x), of float64.

    With z = |x|, Φ(-z) = erfcx(z / √2) / 2 · exp(-z² / 2). The logarithm of (1 + z) erfcx(z / √2) / 2 is smooth in
    t = (z - c) / (z + c), which runs from -1 to 1; a polynomial in t gives it.
    """
    z = x.abs()
    t = (z - TAIL_CENTER) / (z + TAIL_CENTER)
    smooth = sum(float(factor) * t**power for power, factor in enumerate(_tail_polynomial()))
    tail = smooth - (1 + z).log() - z * z / 2
    return torch.where(x < 0, tail, (1 - tail.exp()).log())


def _tail_polynomial() -> np.ndarray:
    from scipy.special import erfcx

    def smooth(t: np.ndarray) -> np.ndarray:
        z = TAIL_CENTER * (1 + t) / (1 - t)
        return np.log((1 + z) * erfcx(z / np.sqrt(2)) / 2)

    return chebyshev.cheb2poly(chebyshev.chebinterpolate(smooth, TAIL_DEGREE))


def kth_smallest(values: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The k-th smallest along `dim`, and its place."""
    count = values.shape[dim]
    low = k <= count // 2
    found = values.topk(k if low else count + 1 - k, dim, largest=not low, sorted=True)
    return tuple(part.narrow(dim, -1, 1) if keepdim else part.select(dim, -1) for part in found)


def median(values: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """torch's median: of an even number of values the lower of the two in the middle."""
    return kth_smallest(values, (values.shape[dim] + 1) // 2, dim, keepdim)


def mean(values: Tensor, dim: int | Sequence[int], keepdim: bool = False, **options: Any) -> Tensor:
    """torch's mean, of one dimension after the other: onnxruntime adds one by one, and loses four digits of the mean of
    an image."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    for one in dims:
        values = values.mean(one, keepdim=True, **options)
    return values if keepdim else values.squeeze(dims)


def std(values: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    """torch's standard deviation, with divisor n - 1, by such means."""
    count = math.prod(values.shape[one] for one in dim)
    spread = mean((values - mean(values, dim, keepdim=True)).square(), dim, keepdim)
    return (spread * (count / (count - 1))).sqrt()


def _interpolate(images: Tensor, size: Sequence[int], antialias: bool = False, **options: Any) -> Tensor:
    return resize_antialiased(images, size) if antialias else F.interpolate(images, size=size, **options)


REPLACEMENTS: dict[Callable, Callable] = {
    F.interpolate: _interpolate,
    torch.special.log_ndtr: log_ndtr,
    torch.Tensor.mean: mean,
    torch.Tensor.std: std,
    torch.Tensor.kthvalue: lambda *args, **options: torch.return_types.kthvalue(kth_smallest(*args, **options)),
    torch.Tensor.median: lambda *args, **options: torch.return_types.median(median(*args, **options)),
}


class WithOperatorsOfONNX(TorchFunctionMode):
    """For the block, torch's functions that ONNX has no operator for are computed by others."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return REPLACEMENTS.get(function, function)(*args, **kwargs or {})
