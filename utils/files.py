"""Files: written so that a reader never sees half of one, and replaced only where this program wrote them."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.errors import InputError

PROGRAM = "usad"  # the mark by which a later run knows its own files


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix; it replaces `path` in one step unless writing fails.

    Folders are made. Image writers choose the format by the suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem[:30]  # file systems limit the length of names
    temporary = path.with_name(f".{stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
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


def leftovers(paths: Iterable[Path], of: Path | None = None) -> list[Path]:
    """Those of `paths` that a killed run's `atomic_write` left behind, for the target `of` or for any."""
    stem = ".{1,30}" if of is None else re.escape(of.stem[:30])
    pattern = re.compile(rf"\.{stem}\.[0-9a-f]{{16}}\.tmp(\..*)?", re.DOTALL)
    return [path for path in paths if pattern.fullmatch(path.name)]


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` atomically, as UTF-8 with Unix line ends; bytes of file names that are not UTF-8 become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_csv(path: str | os.PathLike, rows: Iterable[Iterable[Any]]) -> None:
    """Write `rows` atomically as CSV; floats with all digits, None as an empty cell. See also `safe_text.safe_cell`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` atomically as indented JSON; NaN is refused, because only Python could read it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def check_writable(folder: Path) -> None:
    """Raise InputError or PermissionError if files cannot be written to `folder`, which need not exist yet."""
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


def claim_folder(folder: Path) -> None:
    """Raise InputError if `folder` holds files that no earlier run wrote; see also `check_writable`."""
    check_writable(folder)
    if is_foreign(folder):
        raise InputError(f"{folder} holds files that USAD did not write; move them or choose another --results-dir")


def mark_folder(folder: Path) -> None:
    """Write our mark before the first result, so that files of an interrupted run are known as ours."""
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", {"program": PROGRAM})


def is_foreign(folder: Path, key: str = "program", marks: Collection[str] = (PROGRAM,)) -> bool:
    """Whether `folder` holds files, but no config.json whose `key` has one of the `marks`."""
    used = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    return used and read_json(folder / "config.json").get(key) not in marks


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object at `path`; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
