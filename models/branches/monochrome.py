"""Cameras without colour: changes of their frames by a codec are noise and tell nothing of the scene.

In the frames of a monochrome or infrared camera red and blue follow from green. Their features have no variance in the
directions of colour until a codec tints a frame by one grey level; divided by almost nothing, that would be an alarm.
So some frames go through a codec when a branch is fitted, and the change of the features is added to their covariance;
and the statistics of scores and maps are of held-out frames before and after a codec. Frames of colour cameras do not
need this: they have noise of their own.
"""

from collections.abc import Callable, Mapping

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

from models.networks.backbones import Backbone

COLOURLESS = 0.5  # grey levels by which red and blue may deviate; rounding alone makes up to 0.45
TINT = 6  # grey levels: codecs err by one or two, which must count little
QUALITY = 75  # of the JPEG
BLOCK = 16  # pixels: JPEG rounds the colours of 16 x 16 pixels together
FRAMES = 16  # of the training images, on which the change is measured


class CodecNoise:
    """Gathers how a codec changes the `vectors` ([B, D] or [B, N, D]) of the first training images without colour."""

    def __init__(self, vectors: Callable[[Tensor], Tensor], backbone: Backbone) -> None:
        self.vectors = vectors
        self.backbone = backbone
        self.count = torch.tensor(0)
        self.squares = torch.zeros((), dtype=torch.float64)  # [D, D] once there are any: sum of outer products

    def update(self, images: Tensor, index: Tensor, vectors: Tensor) -> None:
        """Add images [B, 3, S, S] with the numbers `index` [B] among all, whose vectors are [B, D] or [B, N, D]."""
        if index.min() >= FRAMES:
            return
        first = index < FRAMES
        rows, coded = as_coded(self.backbone.pixels(images)[first], index[first], self.backbone)
        for before, image in zip(vectors[first][rows], coded, strict=True):
            change = (self.vectors(image[None])[0] - before).double().cpu()
            change = change.view(-1, change.shape[-1])
            self.count += len(change)
            self.squares = self.squares + change.mT @ change

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count, "squares": self.squares}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        self.count += state["count"]
        self.squares = self.squares + state["squares"]

    def covariance(self) -> Tensor | float:
        """What to add to the covariance [D, D] of the vectors; 0 if the frames have colour."""
        if self.count == 0:
            return 0.0
        joint = self.squares / self.count
        return (joint + joint.diagonal().diag()) / 2  # so few frames do not show every direction


def as_coded(pixels: Tensor, index: Tensor, backbone: Backbone) -> tuple[list[int], Tensor]:
    """Which of the images [B, 3, S, S] (0 to 1) have no colour, and those as a coarse JPEG gives them.

    The latter are [b, 3, S, S], normalised for the backbone.
    `index` [B], the images' numbers among all, are the seeds of the codec's errors.
    """
    frames = (255 * pixels).cpu()
    rows = [row for row, frame in enumerate(frames) if is_colourless(frame)]
    if not rows:
        return rows, pixels[:0]
    coded = torch.stack([coded_frame(frames[row], int(index[row])) for row in rows])
    return rows, backbone.normalized(coded.to(pixels) / 255)


def is_colourless(pixels: Tensor) -> bool:
    """Whether red and blue of pixels [3, S, S] (0 to 255) are linear functions of green, except for rounding."""
    red, green, blue = (pixels - pixels.mean((1, 2), keepdim=True)).double().flatten(1)
    slope = green / green.square().sum().clamp(min=1e-12)
    strays = [colour - green * (slope @ colour) for colour in (red, blue)]
    return bool(torch.cat(strays).square().mean().sqrt() <= COLOURLESS)


def coded_frame(pixels: Tensor, seed: int) -> Tensor:
    """Pixels [3, S, S] (0 to 255) as a coarse JPEG gives them, with errors in colour, not in brightness."""
    frame = pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()[..., ::-1]  # OpenCV's blue, green, red
    flags = (cv2.IMWRITE_JPEG_QUALITY, QUALITY, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420)
    decoded = cv2.imdecode(cv2.imencode(".jpg", frame, flags)[1], cv2.IMREAD_COLOR)[..., ::-1]
    generator, side = torch.Generator().manual_seed(seed), pixels.shape[-1]
    sizes = (1, -(-side // BLOCK), side)  # one error of the whole frame, one of each block, one of each pixel
    errors = [TINT * (2 * torch.rand(1, 3, size, size, generator=generator) - 1) for size in sizes]
    error = sum(F.interpolate(part, size=(side, side)) for part in errors)[0]
    return torch.from_numpy(decoded.copy()).permute(2, 0, 1) + error - error.mean(0)
