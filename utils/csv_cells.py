"""Cells of CSV files that stay plain text, whatever bytes a file name has and whatever program opens them."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def safe_cell(text: str) -> str:
    """A text cell; what a spreadsheet would run as a formula gets an apostrophe in front.

    Bytes of file names that are not UTF-8 become escapes, and so do carriage returns, which Python's writer does not
    quote. For text only: a number such as -1.5 is written as it is.
    """
    text = text.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")
    return "'" + text if text.lstrip(" \ufeff").startswith(_FORMULA) else text
