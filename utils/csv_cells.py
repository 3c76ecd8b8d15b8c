"""Cells of CSV files that neither a file name's bytes nor a spreadsheet can turn against the reader."""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe_cell(text: str) -> str:
    """A text cell: an apostrophe goes before what a spreadsheet would run as a formula.

    Bytes of file names that are not UTF-8 are written as escapes, and so are carriage returns, which Python's writer
    leaves unquoted. For text only: numbers stay numbers, -1.5 too.
    """
    text = text.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")
    return "'" + text if text.lstrip(" \ufeff").startswith(_FORMULA) else text
