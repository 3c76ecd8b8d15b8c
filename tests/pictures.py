"""Image files of every kind that is taken, and what PNG files consist of."""

import struct
import zlib

import numpy as np
from PIL import Image

RED_RAMP = np.stack(np.broadcast_arrays(*np.ogrid[20:200:12j, 0:250:10j], 60), 2).round().astype(np.uint8)
RGB, GREY = Image.fromarray(RED_RAMP), RED_RAMP[..., 0]
PALETTE = RGB.quantize(64)
DEEP = np.array([[0, 128, 257, 129 * 257, 65535, 65534, 300, 40000]], np.uint16)
TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 6: lambda a: np.rot90(a, -1), 8: np.rot90}


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    return exif


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(np.arange(120, dtype=np.uint8).reshape(12, 10)))
    return image


def grey(levels: np.ndarray) -> np.ndarray:
    return np.dstack([levels] * 3)


IMAGES = [  # name, image, how it is saved, what is read
    *((f"rgb{suffix}", RGB, {}, RED_RAMP) for suffix in (".png", ".bmp", ".tif", ".TIFF", ".PNG")),
    ("grey.png", Image.fromarray(GREY), {}, grey(GREY)),
    ("bits.png", Image.fromarray(GREY > 100), {}, grey((GREY > 100) * 255)),
    ("palette.png", PALETTE, {}, PALETTE.convert("RGB")),
    ("transparent.png", PALETTE, {"transparency": 3}, PALETTE.convert("RGB")),
    ("transparencies.png", PALETTE, {"transparency": bytes(range(256))}, PALETTE.convert("RGB")),
    ("alpha.png", with_alpha(RGB.convert("RGBA")), {}, RED_RAMP),  # dropped, not blended
    ("grey_alpha.png", with_alpha(RGB.convert("LA")), {}, grey(RGB.convert("L"))),
    *((f"deep{suffix}", Image.fromarray(DEEP), {}, grey((DEEP / 257).round())) for suffix in (".png", ".tif")),
    ("big_endian.tif", Image.frombytes("I;16B", (8, 1), DEEP.astype(">u2").tobytes()), {}, grey((DEEP / 257).round())),
    ("pages.tif", RGB, {"save_all": True, "append_images": [Image.fromarray(255 - RED_RAMP)]}, RED_RAMP),
    *((f"turned_{key}.png", RGB, {"exif": turned(key)}, turn(RED_RAMP)) for key, turn in TURNS.items()),
    *((f"turned_{key}.tif", RGB, {"exif": turned(key)}, turn(RED_RAMP)) for key, turn in TURNS.items()),
    ("deep_turned.png", Image.fromarray(DEEP), {"exif": turned(6)}, np.rot90(grey((DEEP / 257).round()), -1)),
    *((f"a{suffix}", RGB, {"quality": 98}, RED_RAMP) for suffix in (".jpg", ".JPEG")),
    ("progressive.jpg", RGB, {"quality": 98, "progressive": True}, RED_RAMP),
    ("turned.jpg", RGB, {"quality": 98, "exif": turned(6)}, np.rot90(RED_RAMP, -1)),
    ("jpeg.tif", RGB, {"quality": 98, "compression": "jpeg"}, RED_RAMP),
    *((f"{packing}.tif", RGB, {"compression": packing}, RED_RAMP) for packing in ("tiff_lzw", "tiff_adobe_deflate")),
    ("palette.bmp", PALETTE, {}, PALETTE.convert("RGB")),
    ("gif.png", PALETTE, {"format": "GIF"}, PALETTE.convert("RGB")),  # the content decides, not the name
    ("webp.png", RGB, {"format": "WEBP", "lossless": True}, RED_RAMP),
    ("animated.png", RGB, {"save_all": True, "append_images": [RGB.rotate(90)]}, RED_RAMP),
    ("cmyk.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), {"quality": 98}, (255, 0, 0)),
    ("deep_turned.tif", Image.fromarray(DEEP), {"tiffinfo": turned(6)}, np.rot90(grey((DEEP / 257).round()), -1)),
]
