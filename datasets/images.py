"""Reading image and mask files, whatever their kind, into one: 8-bit RGB, and bool."""

from __future__ import annotations

import errno
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UnreadableError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}

DISK_ERRORS = {errno.EIO, getattr(errno, "ESTALE", errno.EIO)}
_UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def read_image(path: Path) -> Image.Image:
    """The file's first frame as 8-bit RGB, turned as its EXIF orientation says.

    Grey and palette images are expanded, CMYK is converted, alpha is dropped, 16 bits become 8 (value / 257).
    Raises UnreadableError where the file cannot be read, or holds floats, whose range nobody knows.
    """
    with _open(path) as image:
        if image.mode == "F":
            raise UnreadableError(f"{path} holds floating-point values; convert it to 8 or 16 bits")
        if image.mode.startswith("I"):
            image = Image.fromarray(_to_8_bits(image))
        elif image.mode in ("P", "PA") and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """The mask as an 8-bit grey image of `size` (width, height); raises UnreadableError for any other size."""
    with _open(path) as mask:
        if mask.size != size:
            raise UnreadableError(
                f"mask {path} is {mask.size[0]}x{mask.size[1]} but its image is {size[0]}x{size[1]}; "
                "draw it at the image's size"
            )
        if mask.mode.startswith("I"):
            mask = Image.fromarray(_to_8_bits(mask))
        return mask.convert("L")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """16 bits / 257, rounded, in whole numbers: floats of a large image would take much memory."""
    return ((np.asarray(image, np.int32).clip(0, 65535) + 128) // 257).astype(np.uint8)


class _open:
    """Opens an image, turns every way in which a file can be broken into an UnreadableError that names it.

    A file that is gone, or may not be read, or a failing disk is the system's OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Image.Image:
        try:
            with warnings.catch_warnings(), open(self.path, "rb") as file:
                warnings.simplefilter("ignore")  # of odd EXIF data and the like
                warnings.simplefilter("error", Image.DecompressionBombWarning)  # of over 89 million pixels
                with Image.open(file) as image:
                    image.load()
                    return ImageOps.exif_transpose(image)
        except _UNREADABLE as error:
            if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_ERRORS):
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            raise UnreadableError(f"{self.path} cannot be read as an image ({error}); repair or remove it") from None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _UNREADABLE):
            raise UnreadableError(f"{self.path} cannot be converted to RGB ({error}); repair or remove it") from None
