"""From patch scores to anomaly maps: resize, min-max, Gaussian blur; batched, on the maps' device."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.kernels import linear

BLUR_SIGMA = 4.0  # of the branches' maps, in pixels of the input
TOP_SHARE = 0.01  # of a map's pixels


def resize_maps(maps: Tensor, size: int) -> Tensor:
    """Bilinear resize [B, h, w] -> [B, size, size] with half-pixel centres (OpenCV's convention)."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def resize_images(images: Tensor, size: int) -> Tensor:
    """Antialiased bilinear resize [B, 3, H, W] -> [B, 3, size, size]; unchanged if it has that size."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def map_range(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest value and range [B, 1, 1] of each map [B, h, w]."""
    low = maps.amin((1, 2), keepdim=True)
    return low, maps.amax((1, 2), keepdim=True) - low


def mean_of_top(maps: Tensor) -> Tensor:
    """Mean [B] of the highest hundredth of each map [B, H, W]: steadier than the single highest value."""
    pixels = maps.flatten(1)
    return pixels.topk(max(1, round(TOP_SHARE * pixels.shape[1])), sorted=False).values.mean(1)


def gaussian_blur(maps: Tensor, sigma: float, radius: int | None = None, edge_repeated: bool = True) -> Tensor:
    """Gaussian blur of maps [B, H, W], truncated at `radius` pixels (4 sigma unless given), borders mirrored."""
    radius = int(4 * sigma + 0.5) if radius is None else radius
    for _ in range(2):  # along the columns; then, transposed, along the rows
        matrix = _blur_matrix(maps.shape[-1], sigma, radius, edge_repeated, maps.dtype, maps.device)
        maps = linear(maps.flatten(0, 1), matrix).view_as(maps).mT
    return maps


@functools.lru_cache(maxsize=32)  # on the device: copied there in every call, it would stop the host each time
def _blur_matrix(
    length: int, sigma: float, radius: int, edge_repeated: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[length, length] matrix whose product with a signal blurs it, borders included."""
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    kernel /= kernel.sum()
    source = torch.arange(length)[:, None] + offsets
    period = max(2 * length if edge_repeated else 2 * length - 2, 1)
    source = source % period
    source = torch.minimum(source, period - int(edge_repeated) - source).clamp(min=0)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    return matrix.scatter_add_(1, source, kernel.expand(length, -1).contiguous()).to(device, dtype)
