"""Whose files a folder holds: only what this program wrote is ever replaced."""

import json
from pathlib import Path

from utils.errors import InputError
from utils.files import check_writable, write_json

PROGRAM = "usad"  # the mark by which a later run knows its own files


def claim_folder(folder: Path) -> None:
    """Raise InputError if `folder` holds files that no earlier run wrote; see also `check_writable`."""
    check_writable(folder)
    used = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    if used and not is_ours(folder / "config.json"):
        raise InputError(f"{folder} holds files that USAD did not write; move them or choose another --results-dir")


def mark_folder(folder: Path) -> None:
    """Write our mark before the first result, so that files of an interrupted run are known as ours."""
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", {"program": PROGRAM})


def is_ours(path: Path) -> bool:
    """Whether the JSON file at `path` carries our mark."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["program"] == PROGRAM
    except (OSError, ValueError, KeyError, TypeError):
        return False
