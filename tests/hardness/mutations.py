"""Damaged and lying variants of good files: wrong bytes, and structures that claim wrong things."""

import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from pictures import png_chunk

Mutation = Callable[[random.Random, bytes], bytes]

LIES = [
    *(None, True, False, 0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 10**30, -(2**63)),
    *(0.0, -0.5, 1e-300, 1e308, float("inf"), float("nan"), "", "x", "../../x", "/etc/passwd", "pretrained", "file"),
    *("a\nb", "\x00", "é" * 300, "F32", "I64", "BF16", "pc", "ma_clu", "test_vit", "vit_small_patch14_dinov2"),
    *([], [0], [0, 0], [2**40, 2**40], [1] * 50, {}, {"a": 1}, [[[[[]]]]]),
]


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut, double, insert or truncate, one to four times."""
    changed = bytearray(data)
    near = rng.random() < 0.6  # headers decide most
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        place = rng.randrange(min(len(changed), 600) if near else len(changed))
        span = rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(7):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.randrange(256)
            case 2:
                number = rng.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1))
                changed[place : place + 8] = number.to_bytes(8, rng.choice(("little", "big")))
            case 3:
                del changed[place : place + span]
            case 4:
                changed[place:place] = changed[place : place + span] * rng.randint(1, 3)
            case 5:
                changed[place:place] = rng.randbytes(span)
            case 6:
                del changed[place:]
    return bytes(changed)


def of_values(rng: random.Random, value: Any) -> Any:
    """A JSON value with some parts replaced by lies, left out or exchanged."""
    for _ in range(rng.randint(1, 3)):
        value = _lie(rng, value)
    return value


def _lie(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value, key = dict(value), rng.choice(list(value))
        if rng.random() < 0.1:
            value[str(rng.choice(LIES))] = value.pop(key)
        elif rng.random() < 0.1:
            del value[key]
        else:
            value[key] = _lie(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], _lie(rng, value[place]), *value[place + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.3:
        return value * rng.choice((-1, 2, 0.5, 1000, 10**6))
    return rng.choice(LIES)


def of_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with other values."""
    return json.dumps(of_values(rng, json.loads(data))).encode()


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with other values in its header or in the JSON of its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if metadata and rng.random() < 0.6:
        (key,) = metadata
        metadata[key] = json.dumps(of_values(rng, json.loads(metadata[key])))
    else:
        header = of_values(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def of_zip(rng: random.Random, data: bytes) -> bytes:
    """A file of torch.save with another program or other numbers inside, with correct checksums."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(written, "w") as changed:
        records = archive.namelist()
        chosen = next(name for name in records if name.endswith("data.pkl"))
        chosen = chosen if rng.random() < 0.8 else rng.choice(records)
        for name in records:
            content = archive.read(name)
            changed.writestr(name, of_bytes(rng, content) if name == chosen else content)
    return written.getvalue()


TAR_FIELDS = [  # place, length, and what is written there
    (0, 100, [b"../x", b"/tmp/x", b"coal_ad/../../x", b"C:\\x", b"coal_ad", b"\xff", b"a" * 100]),  # name
    (124, 12, [b"77777777777", b"-0000000001", b"\x80" + b"\xff" * 11, b"99999", b"00000000001"]),  # size
    (156, 1, [bytes([kind]) for kind in b"0123456789xgLKSDNVMA\x00"]),  # kind
    (157, 100, [b"/etc/passwd", b"../x", b"coal_ad/train"]),  # target of a link
]


def of_tar(rng: random.Random, data: bytes) -> bytes:
    """A tar archive with changed header fields, with correct checksums."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        start = tarfile.BLOCKSIZE * rng.randrange(len(changed) // tarfile.BLOCKSIZE)
        header = changed[start : start + tarfile.BLOCKSIZE]
        place, length, values = rng.choice(TAR_FIELDS)
        header[place : place + length] = rng.choice(values).ljust(length, b"\x00")[:length]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\x00 " % sum(header)
        changed[start : start + tarfile.BLOCKSIZE] = header
    return bytes(changed)


def of_png(rng: random.Random, data: bytes) -> bytes:
    """A PNG with another header, chunk order or pixel data and correct checksums; other formats by their bytes."""
    if not data.startswith(b"\x89PNG"):
        return of_bytes(rng, data)
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    if kind == b"IHDR":
        width, height = (rng.choice((0, 1, 3, 10_000, 30_000, 2**31 - 1)) for _ in range(2))
        content = struct.pack(">II", width, height) + bytes(rng.randrange(17) for _ in range(5))
    elif kind == b"IDAT" and rng.random() < 0.5:
        content = zlib.compress(bytes(rng.choice((10, 10**6, 10**8))))
    else:
        content = of_bytes(rng, content or b"\x00")
    chunks[index] = kind, content
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    return data[:8] + b"".join(png_chunk(kind, content) for kind, content in chunks)
