"""The network that ships: fixed wavelets on brightness and colour. Nothing in it is learned or downloaded.

Its maps are moduli of Gabor wavelets on a pyramid, and moduli of moduli: a scattering transform (Bruna and Mallat,
"Invariant Scattering Convolution Networks", 2013) with box filters between the scales. See docs/demo_network.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "wavelet_pyramid"
STRIDE = 8  # pixels of the input between two places of a map
SCALES = 5  # octaves, the finest about 4 pixels long
ORIENTATIONS = 6
COLOUR_SCALES = 3
SURROUNDINGS = 16  # pixels: the coarser of the two scales at which colours are kept
NOISE = 0.02  # added to a modulus before its logarithm, in standard deviations of the image
# Brightness, red-green, blue-yellow: differences of colour are small in grey scenes, and count eightfold.
OPPONENTS = ((1 / 3, 1 / 3, 1 / 3), (8.0, -8.0, 0.0), (-4.0, -4.0, 8.0))
WIDTH = 7  # of a filter
FREQUENCY = 0.55 * math.pi  # radians a pixel
SPREAD = 1.5  # standard deviation along the wave in pixels; across it is longer
SLANT = 0.55


class WaveletPyramid(nn.Module):
    """Images [B, 3, S, S] -> maps [B, C, S/8, S/8]: colour, its surroundings, colour moduli, brightness moduli.

    C is 3, 3, 6 and 30; with `second_order` a fifth map follows, of 360 moduli of the brightness moduli at coarser
    scales.
    """

    def __init__(self, second_order: bool) -> None:
        super().__init__()
        self.second_order = second_order
        pairs = SCALES * (SCALES - 1) // 2
        self.widths = [3, 3, 2 * COLOUR_SCALES, SCALES * ORIENTATIONS] + [pairs * ORIENTATIONS**2] * second_order
        self.register_buffer("filters", _gabor_filters())
        self.register_buffer("opponents", torch.tensor(OPPONENTS))

    def forward(self, images: Tensor) -> list[Tensor]:
        grid = images.shape[-1] // STRIDE
        image = torch.einsum("oc,bchw->bohw", self.opponents, images)
        colour, surroundings = _to_grid(image, grid), _to_grid(F.avg_pool2d(image, SURROUNDINGS), grid)
        first, second, colour_moduli, finer = [], [], [], []
        for scale in range(SCALES):
            moduli = self.moduli(image[:, :1])
            first.append(_log_on_grid(moduli, grid, NOISE))
            if scale < COLOUR_SCALES:
                both = self.moduli(image[:, 1:]).unflatten(1, (2, ORIENTATIONS)).mean(2)
                colour_moduli.append(_log_on_grid(both, grid, NOISE))
            if self.second_order:
                second += [_log_on_grid(self.moduli(maps), grid, NOISE / 4) for maps in finer]
                finer = [F.avg_pool2d(maps, 2) for maps in finer] + [moduli]
            image = F.avg_pool2d(image, 2)
        groups = [colour_moduli, first, *([second] if self.second_order else [])]
        return [colour, surroundings, *(torch.cat(group, 1) for group in groups)]

    def moduli(self, maps: Tensor) -> Tensor:
        """Maps [B, C, h, w] -> moduli of their six wavelet transforms [B, 6 C, h/2, w/2]."""
        batch, channels = maps.shape[:2]
        padded = F.pad(maps.flatten(0, 1)[:, None], [WIDTH // 2] * 4, mode="reflect")
        real, imaginary = F.conv2d(padded, self.filters, stride=2).chunk(2, 1)
        return (real.square() + imaginary.square() + 1e-12).sqrt().unflatten(0, (batch, channels)).flatten(1, 2)


def _to_grid(maps: Tensor, grid: int) -> Tensor:
    side = maps.shape[-1]
    if side % grid == 0:
        return F.avg_pool2d(maps, side // grid)  # what adaptive pooling gives, faster
    if side > grid:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)


def _log_on_grid(moduli: Tensor, grid: int, noise: float) -> Tensor:
    return (_to_grid(moduli, grid) + noise).log()


def _gabor_filters() -> Tensor:
    """[12, 1, 7, 7]: real, then imaginary parts of six waves under an oval bell, without mean, of unit sum.

    Rounded to 20 binary places, so that they are the same to the last bit on every machine.
    """
    down, across = torch.meshgrid(*[torch.arange(WIDTH, dtype=torch.float64) - WIDTH // 2] * 2, indexing="ij")
    waves = []
    for angle in math.pi / ORIENTATIONS * torch.arange(ORIENTATIONS, dtype=torch.float64):
        along = across * angle.cos() + down * angle.sin()
        beside = down * angle.cos() - across * angle.sin()
        bell = torch.exp(-(along.square() + (SLANT * beside).square()) / (2 * SPREAD**2))
        wave = bell * torch.exp(1j * FREQUENCY * along)
        wave = wave - bell * (wave.sum() / bell.sum())
        waves.append(wave / wave.abs().sum())
    filters = torch.stack([wave.real for wave in waves] + [wave.imag for wave in waves])
    return ((filters * 2**20).round() / 2**20).float()[:, None]
