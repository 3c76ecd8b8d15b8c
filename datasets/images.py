"""Reads image and mask files of every kind: images as 8-bit RGB, masks as a bool for each pixel."""

import contextlib
import dataclasses
import enum
import errno
import functools
import os
import struct
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from datasets import MAX_MEGAPIXELS
from utils import distributed
from utils.command_line import warn_once
from utils.errors import UnreadableError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
DEPTHS = range(8, 17)  # bits of the cameras whose images are stored in 16
DISK_ERRORS = {errno.EIO, errno.ESTALE}
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what decoders raise
PHOTOMETRIC = 262  # a tag of TIFFs; 0: white is stored as 0
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)  # an EXIF tag, and its values that swap width and height


@dataclasses.dataclass(frozen=True)
class Decoding:
    max_megapixels: float = MAX_MEGAPIXELS  # larger files are refused: a few bytes could unpack to more than the memory
    bit_depth: int = DEPTHS[-1]  # of the camera behind 16-bit files: 12 means values from 0 to 4095


PLAIN = Decoding()


class Note(enum.IntFlag):
    """What may surprise in a file that can be read."""

    LABELS = 1  # a mask of labels, not of black and white
    EMPTY = 2  # masks that mark nothing
    DIM = 4  # 16 bits, of which under an eighth of the range is used
    REDUCED = 8  # decoded at a reduced scale
    PAGES = 16  # a TIFF of several pages
    FULL = 32  # masks that mark everything
    MASK_PAGES = 64  # a mask of several pages
    FAINT = 128  # a mask with more values below half of full scale than above


OF_MASKS = Note.LABELS | Note.EMPTY | Note.FULL | Note.MASK_PAGES | Note.FAINT
TEXTS = {
    Note.LABELS: "the masks hold labels, not black and white: every pixel that is not background counts as defect",
    Note.FAINT: "most of what the masks mark is below half of full scale and counts as normal; save defects as 255",
    Note.EMPTY: "the masks mark nothing, although they lie in a defect's folder: all their pixels count as normal",
    Note.FULL: "the masks mark the whole frame; paint black what is no defect (not transparent)",
    Note.DIM: "16 bits, of which under an eighth of the range is used: train with the --bit-depth of the camera, for "
    "instance 10 or 12",
    Note.REDUCED: "larger than --max-megapixels allows: the JPEG decoder gives them at a reduced scale",
    Note.PAGES: "of several pages only the first is looked at; save the others that count as files of their own",
    Note.MASK_PAGES: "of masks of several pages only the first counts; save each page as a mask of its own",
}


class Notes:
    """Counts the notes on many files, with an example of each kind."""

    def __init__(self) -> None:
        self._found: dict[Note, tuple[int, str]] = {}

    def add(self, notes: int, image: object, mask: object = None) -> None:
        """Take in the notes on an image and its masks."""
        for note in Note:
            if note & notes:
                count, example = self._found.get(note, (0, str(mask if note in OF_MASKS else image)))
                self._found[note] = count + 1, example

    def say(self) -> None:
        """Warn of what all processes have found: once a run, and of masks once for each data set."""
        parts = distributed.gathered(self._found)
        for note, text in TEXTS.items():
            if found := [part[note] for part in parts if note in part]:
                count, example = sum(count for count, _ in found), found[0][1]
                key = (example, note) if note in OF_MASKS else note
                warn_once(key, f"{count} files, for instance {example}: {text}")


class Picture(NamedTuple):
    """The picture in an image file, turned by its EXIF orientation."""

    image: Image.Image  # RGB
    size: tuple[int, int]  # full width and height; those of `image` are smaller if it was decoded at a reduced scale
    notes: Note = Note(0)


def find_files(
    folder: str | os.PathLike, extensions: Collection[str] = EXTENSIONS, above: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Files with one of the suffixes, in any case, in `folder` and its sub-folders; hidden ones are skipped."""
    real = os.path.realpath(folder)
    if real in above:  # a link to one of the folders above it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from find_files(entry.path, extensions, above | {real})
            elif os.path.splitext(entry.name)[1].lower() in extensions and entry.is_file():
                yield Path(entry.path)


def stretched(image: Image.Image, size: int, resampling: str) -> np.ndarray:
    """An RGB image stretched to a square (antialiased), uint8 [size, size, 3]."""
    return np.array(image.resize((size, size), Image.Resampling[resampling.upper()]))


def read_picture(path: str | os.PathLike, decoding: Decoding = PLAIN) -> Picture:
    """The file's first frame as RGB without alpha; raises UnreadableError if it is broken, too large, or of floats."""
    with _opened(path) as image:
        size, notes = image.size, _check_size(image, path, decoding)
        if image.mode == "F":
            raise UnreadableError(f"{path} holds floating-point values; convert it to 8 or 16 bits")
        image, dim = _to_8_bits(image, path, decoding.bit_depth)
        turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
        ImageOps.exif_transpose(image, in_place=True)
        return Picture(to_rgb(image), size[::-1] if turned else size, notes | Note.DIM if dim else notes)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel as RGB; alpha is dropped. Raises ValueError if Pillow cannot convert its mode."""
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_size(image: Image.Image, path: str | os.PathLike, decoding: Decoding, reducible: bool = True) -> Note:
    """Have an image above the limit decoded at a reduced scale; returns what is to be noted.

    Raises UnreadableError where that is impossible, or saves no memory, as of a progressive JPEG.
    """
    (width, height), limit = image.size, decoding.max_megapixels
    if width * height <= limit * 1e6:
        several = image.format == "TIFF" and image.is_animated  # those of a JPEG or PNG are previews or movements
        return Note.PAGES if several else Note(0)
    for scale in (2, 4, 8) if reducible and not image.info.get("progressive") else ():
        if width * height <= limit * 1e6 * scale**2 and image.draft(None, (width // scale, height // scale)):
            return Note.REDUCED
    size = f"{width}x{height}, which is {width * height / 1e6:.1f} megapixels"
    raise UnreadableError(f"{path} is {size}, and the limit is {limit:g}; raise it with --max-megapixels")


def _to_8_bits(image: Image.Image, path: str | os.PathLike, bit_depth: int) -> tuple[Image.Image, bool]:
    """The image with 8 bits a channel, and whether it had 16 and uses less than an eighth of their range."""
    grey, deep_color = image.mode.startswith("I"), has_deep_color(image)
    image.load()
    if not (grey or deep_color):
        return image, False
    if deep_color and bit_depth == 16:  # Pillow has dropped the low byte
        return image, max(high for _, high in image.convert("RGB").getextrema()) < 32
    values = _grey_values(image) if grey else _read_deep_color(path)
    top, low, high = 2**bit_depth - 1, int(values.min()), int(values.max())
    if low < 0 or high > top:
        remedy = f"train with --bit-depth {high.bit_length()}" if low >= 0 and high < 65536 else "convert it to 16 bits"
        raise UnreadableError(f"{path} holds values from {low} to {high}, and {bit_depth} bits end at {top}; {remedy}")
    return _as_lying(levels(bit_depth)[values], image), high < (top + 1) // 8


def _as_lying(values: np.ndarray, image: Image.Image) -> Image.Image:
    """Values that were read beside Pillow, [H, W] or [H, W, 3], as an image with the orientation of `image`."""
    other = Image.fromarray(values)
    other.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    return other


def has_deep_color(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has colours of 16 bits, of which Pillow would drop 8."""
    return image.mode[0] != "I" and ";16" in str(getattr(image, "tile", ""))


def _grey_values(image: Image.Image) -> np.ndarray:
    """The numbers [H, W] of a grey image; Pillow leaves 16 bits inverted where a TIFF stores white as 0."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    return 65535 - values if image.mode.startswith("I;16") and tags.get(PHOTOMETRIC) == 0 else values


@functools.cache
def levels(bit_depth: int) -> np.ndarray:
    """The 8-bit level of each value of so many bits, rounded: uint8 [2 ** bit_depth]."""
    top = 2**bit_depth - 1
    return ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)


def _read_deep_color(path: str | os.PathLike) -> np.ndarray:
    """All 16 bits of each channel, [H, W, 3] uint16; Pillow gives only 8."""
    import cv2

    values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        raise ValueError("its 16-bit colours cannot be decoded")
    return values[..., 2::-1]


def read_mask(
    paths: Sequence[Path], size: tuple[int, int] | None = None, decoding: Decoding = PLAIN
) -> tuple[np.ndarray, Note]:
    """What the masks of an image mark together, bool [H, W].

    A pixel is marked from half of full scale on. If no pixel of a mask reaches that, or its colours come from a
    palette, the mask holds labels, and everything but the background is marked; not so a JPEG, for its zeros are not
    exact. Raises UnreadableError for a file that cannot be read, or not of the image's `size` (width, height).
    """
    marked, notes = None, Note(0)
    for path in paths:
        with _opened(path) as mask:
            if _check_size(mask, path, decoding, reducible=False) == Note.PAGES:
                notes |= Note.MASK_PAGES
            deep_color = has_deep_color(mask)
            mask.load()
            if deep_color:
                mask = _as_lying(_read_deep_color(path).max(2), mask)  # the strongest channel, as a grey image
            ImageOps.exif_transpose(mask, in_place=True)
            size = size or mask.size
            if mask.size != size:
                raise UnreadableError(
                    f"mask {path} is {mask.size[0]}x{mask.size[1]} but its image is {size[0]}x{size[1]}; "
                    "draw it at the image's size"
                )
            found, note = _marked_by_palette(mask) if mask.mode in ("P", "PA") else _marked_by_value(mask)
        marked = found if marked is None else marked | found
        notes |= note
    if marked.all():
        notes |= Note.FULL
    return marked, notes if marked.any() else notes | Note.EMPTY


def _marked_by_value(mask: Image.Image) -> tuple[np.ndarray, Note]:
    """The marked pixels, and what is to be noted. A colour counts by its strongest channel, even pure blue."""
    if mask.mode[0] in "IF":
        values = _grey_values(mask)
    elif mask.mode in ("1", "L", "LA"):
        values = np.asarray(mask.convert("L"))
    else:
        values = np.asarray(mask.convert("RGB")).max(2)
    marked = values >= (32768 if mask.mode[0] == "I" else 128)
    nonzero = values != 0
    if "jpeg" in f"{mask.format} {mask.info.get('compression')}".lower():
        return marked, Note(0)
    if marked.any():
        return marked, Note.FAINT if 2 * marked.sum() < nonzero.sum() else Note(0)
    return nonzero, Note.LABELS if nonzero.any() else Note(0)


def _marked_by_palette(mask: Image.Image) -> tuple[np.ndarray, Note]:
    """The marked pixels, labels if any is dark. The background is black or, if there is none, the first colour."""
    indices = np.asarray(mask).reshape(*mask.size[::-1], -1)[..., 0]
    flat = mask.getpalette("RGB")
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(flat) // 3] = np.reshape(flat, (-1, 3))
    used = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
    if (palette[used] == used[:, None]).all():
        return _marked_by_value(Image.fromarray(indices))  # a grey picture
    black = used[(palette[used] == 0).all(1)]
    background = black[0] if len(black) else 0
    brightness = palette[used[used != background]] @ (0.299, 0.587, 0.114)
    return indices != background, Note.LABELS if (brightness < 128).any() else Note(0)


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The image, not yet loaded; a broken file becomes an UnreadableError, the system's errors stay OSErrors."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `Decoding` has a limit whose error names the flag
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")  # of odd EXIF data and the like
            with Image.open(file) as image:
                yield image
    except BROKEN as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_ERRORS):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise UnreadableError(f"{path} cannot be read as an image ({error}); repair or remove it") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
