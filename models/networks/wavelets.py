"""The bundled network: fixed wavelets on brightness and colour. Nothing in it is learned or downloaded.

Its maps are moduli of Gabor wavelets on a pyramid, and moduli of moduli: a scattering transform (Bruna and Mallat,
"Invariant Scattering Convolution Networks", 2013) with box filters between the scales. See docs/demo_network.md.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8  # pixels of the input between two places of a map
SIZE_STEP = 2 * STRIDE  # of inputs: every octave halves without a remainder
SCALES = 5  # octaves, the finest about 4 pixels long
ORIENTATIONS = 6
COLOUR_SCALES = 3
NOISE = 0.02  # added to a modulus before its logarithm (brightness has the standard deviation one)
SHADOW = 0.2  # of an image's mean brightness, added to the divisor: dark colours are mostly noise
COLOUR_GAIN = 8.0  # colours differ less than brightness does
GREY_LEVEL = 1 / 255  # least standard deviation of brightness: what a flat frame's noise and rounding make
WIDTH = 7  # of a filter
FREQUENCY = 0.55 * math.pi  # radians a pixel
SPREAD = 1.5  # standard deviation along the wave in pixels; across it is longer
SLANT = 0.55
ORDINARY = 1.5  # a patch within so many standard deviations of its image is not unusual
FLAT = 1e-3  # added to a standard deviation before dividing by it or taking its logarithm
EXTREME = 0.005  # share of an image's places beyond the low and the high extreme
# In tokens: the weight of a channel's deviation relative to its excess, and of second order relative to first.
DEVIATION_WEIGHT, SECOND_DEVIATION_WEIGHT, SECOND_CLASS_WEIGHT = 0.3, 0.1, 0.3
COPIED = 1  # places along the border of PatchCore's maps that take the next place's values
CONSTANTS = (NOISE, SHADOW, COLOUR_GAIN, GREY_LEVEL, ORDINARY, FLAT, EXTREME)
CONSTANTS += (DEVIATION_WEIGHT, SECOND_DEVIATION_WEIGHT, SECOND_CLASS_WEIGHT)


class WaveletPyramid(nn.Module):
    """Pixels [B, 3, S, S] of 0 to 1 -> maps [B, C, S/8, S/8]: colour, moduli of colour, moduli of brightness.

    C is 3, 6 and 30. With `second_order` a fourth map follows: 360 moduli, at coarser scales, of the brightness moduli.
    Moduli are logarithmic; those of brightness are averaged over 3 x 3 places. S is a multiple of 16.
    """

    def __init__(self, second_order: bool) -> None:
        super().__init__()
        self.second_order = second_order
        pairs = SCALES * (SCALES - 1) // 2
        self.widths = [3, 2 * COLOUR_SCALES, SCALES * ORIENTATIONS] + [pairs * ORIENTATIONS**2] * second_order
        self.register_buffer("filters", _gabor_filters())
        constants = CONSTANTS if second_order else (*CONSTANTS, COPIED)
        self.register_buffer("constants", torch.tensor(constants))  # so that the fingerprint depends on them

    def forward(self, pixels: Tensor) -> list[Tensor]:
        grid = pixels.shape[-1] // STRIDE
        image = brightness_and_colour(pixels)
        colour = _to_grid(image, grid)
        colour = colour - colour.flatten(2).median(2).values[..., None, None]  # an object's colour would move a mean
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
        texture = F.avg_pool2d(torch.cat(first, 1), 3, stride=1, padding=1, count_include_pad=False)
        return [colour, torch.cat(colour_moduli, 1), texture, *([torch.cat(second, 1)] if self.second_order else [])]

    def moduli(self, maps: Tensor) -> Tensor:
        """Maps [B, C, h, w] -> moduli of their six wavelet transforms [B, 6 C, h/2, w/2]."""
        batch, channels = maps.shape[:2]
        padded = F.pad(maps.flatten(0, 1)[:, None], [WIDTH // 2] * 4, mode="reflect")
        real, imaginary = F.conv2d(padded, self.filters, stride=2).chunk(2, 1)
        return (real.square() + imaginary.square() + 1e-12).sqrt().unflatten(0, (batch, channels)).flatten(1, 2)


def brightness_and_colour(pixels: Tensor) -> Tensor:
    """Pixels [B, 3, S, S] of 0 to 1 -> logarithmic brightness, red-green, blue-yellow [B, 3, S, S].

    Neither depends on the exposure. Colour hardly depends on how brightly a place is lit, because it is a difference
    divided by the brightness there. All have mean zero over the image, brightness also standard deviation one.
    """
    pixels = pixels.clamp(min=0)
    exposure = pixels.mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    pixels = pixels / exposure
    brightness = pixels.mean(1, keepdim=True) + SHADOW
    red, green, blue = (COLOUR_GAIN * pixels / brightness).split(1, 1)
    differences = torch.cat([red - green, blue - (red + green) / 2], 1)
    brightness = brightness.log()
    brightness = brightness - brightness.mean((2, 3), keepdim=True)
    brightness = brightness / brightness.std((2, 3), keepdim=True).maximum(GREY_LEVEL / exposure)
    return torch.cat([brightness, differences - differences.mean((2, 3), keepdim=True)], 1)


def class_token(first: Tensor, second: Tensor) -> Tensor:
    """Maps [B, C, h, w] and second-order maps [B, E, h, w] -> [B, 4 C + 2 E], a description of the whole image.

    Means and logarithmic standard deviations of the channels and, of the first order, low and high extremes.
    """
    places = first.flatten(2)
    count = max(1, round(EXTREME * places.shape[2]))
    low = places.kthvalue(count, 2).values
    high = places.kthvalue(places.shape[2] + 1 - count, 2).values
    moments = []
    for maps, weight in ((first, 1.0), (second, SECOND_CLASS_WEIGHT)):
        mean, spread = _mean_and_spread(maps)
        moments += [weight * mean.flatten(1), weight * spread.log().flatten(1)]
    return torch.cat([*moments, low, high], 1)


def patch_tokens(first: Tensor, second: Tensor) -> Tensor:
    """Maps [B, C, h, w] and second-order maps [B, E, h, w] -> [B, h*w, 2 C + E]: how unusual a place is in its image.

    Absolute deviations of the channels from the image's mean and, of the first order, the excess of the deviation over
    1.5 standard deviations of the image, in standard deviations.
    """
    mean, spread = _mean_and_spread(first)
    deviation, second_deviation = (first - mean).abs(), (second - second.mean((2, 3), keepdim=True)).abs()
    excess = (deviation / spread - ORDINARY).clamp(min=0)
    weighted = [DEVIATION_WEIGHT * deviation, excess, SECOND_DEVIATION_WEIGHT * second_deviation]
    return torch.cat(weighted, 1).flatten(2).transpose(1, 2)


def _mean_and_spread(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's mean over an image [B, C, 1, 1], and its standard deviation, never zero."""
    mean = maps.mean((2, 3), keepdim=True)
    return mean, (maps - mean).square().mean((2, 3), keepdim=True).sqrt() + FLAT


def _to_grid(maps: Tensor, grid: int) -> Tensor:
    side = maps.shape[-1]
    if side >= grid:
        return F.avg_pool2d(maps, side // grid)  # without a remainder, see SIZE_STEP
    return F.interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False)


def _log_on_grid(moduli: Tensor, grid: int, noise: float) -> Tensor:
    return (_to_grid(moduli, grid) + noise).log()


def _gabor_filters() -> Tensor:
    """[12, 1, 7, 7]: real, then imaginary parts of six waves under an oval bell, with zero mean and unit sum.

    Rounded to 20 binary places, so that they are bit for bit the same on every machine.
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
