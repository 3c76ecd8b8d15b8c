"""Writing files so that a reader sees the old content or the new one, never half of it."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` in one step, or is removed if writing fails.

    Parent folders are created. The temporary name keeps the suffix: image writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_temporary_stem(path)}{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk, for instance, gives no file name
        if error.errno is None:  # a library's own words
            raise OSError(errno.EIO, str(error), str(path)) from error
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_stem(path: Path) -> str:
    return f".{path.stem[:30]}."  # shortened: file systems limit the length of names


def leftovers(paths: Iterable[Path], of: Path | None = None) -> list[Path]:
    """Those of `paths` that a killed run's `atomic_write` left behind, for the target `of` or for any."""
    start = r"\..{1,30}\." if of is None else re.escape(_temporary_stem(of))
    pattern = re.compile(start + r"[0-9a-f]{16}\.tmp(\..*)?", re.DOTALL)
    return [path for path in paths if pattern.fullmatch(path.name)]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` atomically, as UTF-8 with Unix line ends; bytes of file names that are not UTF-8 become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` atomically as indented JSON; NaN is refused, because only Python could read it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def check_writable(folder: Path) -> None:
    """Check before the work that files can be written to `folder`, which need not exist yet.

    Raises InputError if a file has its name, PermissionError if it may not be written.
    """
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise InputError(f"{existing} is no folder; move it away, or choose another folder than {folder}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "this folder cannot be written", str(existing))


def digest_of_lines(lines: Iterable[str]) -> str:
    """SHA-256 (hex) of a list of strings, for instance the paths a model was fitted on."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def sha256_of_file(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
