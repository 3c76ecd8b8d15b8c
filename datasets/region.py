"""The region of interest: the part of each frame that is looked at."""

from __future__ import annotations

import base64
import io
import os

import numpy as np
from PIL import Image

from datasets.images import PLAIN, Decoding, read_mask
from utils.command_line import warn_once
from utils.errors import InputError

MAX_SIDE = 2048  # of the stored region; it is scaled to each frame anyway


class RegionOfInterest:
    """`inside`, bool [H, W], is True where frames are looked at; nothing else reaches a network.

    Raises InputError if it is False everywhere.
    """

    def __init__(self, inside: np.ndarray) -> None:
        self.inside = np.array(inside, bool)
        self.inside.setflags(write=False)
        if not self.inside.any():
            raise InputError("the region of interest is empty: paint white what is to be looked at")

    @classmethod
    def read(cls, path: str | os.PathLike, decoding: Decoding = PLAIN) -> RegionOfInterest:
        """From an image file, read like a mask: what it marks is inside.

        Raises InputError if that is nothing; warns if it is everything, as what editors leave under transparency.
        """
        if not os.path.isfile(path):
            raise InputError(f"--roi {path}: no such file")
        image = Image.fromarray(read_mask([path], decoding=decoding)[0]).convert("L")
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BOX)
        levels = np.asarray(image)
        try:
            region = cls(levels >= min(128, max(1, levels.max())))  # what is thin stays
        except InputError as error:
            raise InputError(f"--roi {path}: {error}") from None
        if region.inside.all():
            warn_once(path, f"--roi {path} marks the whole frame; paint black what is not looked at (not transparent)")
        return region

    def to_text(self) -> str:
        """The region for a checkpoint: a PNG in base64."""
        content = io.BytesIO()
        Image.fromarray(self.inside).save(content, "PNG", optimize=True)
        return base64.b64encode(content.getvalue()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> RegionOfInterest:
        """The region that `to_text` wrote. Raises ValueError or InputError for anything else."""
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
                if max(image.size) > MAX_SIDE:
                    raise ValueError(f"a region of {image.size[0]}x{image.size[1]} pixels")
                return cls(np.asarray(image.convert("1"), bool))
        except (OSError, SyntaxError, TypeError) as error:
            raise ValueError(f"a region of interest that cannot be read ({error})") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RegionOfInterest) and np.array_equal(self.inside, other.inside)

    def __hash__(self) -> int:
        return hash((self.inside.shape, int(self.inside.sum())))

    @property
    def share(self) -> float:
        """The part of a frame that is inside, 0 to 1."""
        return float(self.inside.mean())

    def at(self, width: int, height: int) -> np.ndarray:
        """The region at that size, bool [height, width], by the nearest pixel; never empty, however small."""
        scaled = np.asarray(Image.fromarray(self.inside).resize((width, height), Image.Resampling.NEAREST), bool)
        if scaled.any():
            return scaled
        share = Image.fromarray(self.inside.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        return np.asarray(share) == np.max(share)

    def on_grid(self, rows: int, columns: int) -> np.ndarray:
        """The cells of a grid that lie inside by half or, if there are none, by most: bool [rows, columns]."""
        size = columns * 16, rows * 16
        share = self.at(*size).reshape(rows, 16, columns, 16).mean((1, 3))
        return share >= min(0.5, share.max())

    def apply(self, image: Image.Image) -> Image.Image:
        """An RGB image with everything outside in the mean colour of the inside, so that the edge adds no contrast."""
        inside = self.at(*image.size)
        pixels = np.array(image)
        pixels[~inside] = pixels[inside].mean(0).round()
        return Image.fromarray(pixels)
