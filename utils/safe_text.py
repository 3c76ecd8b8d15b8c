"""Names and addresses from elsewhere, before they are printed or written."""

import re

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_USER = re.compile(r"://.*@", re.DOTALL)  # to the last @: passwords may hold spaces, slashes, and @ itself
_ADDRESS = re.compile(r"\w://\S*")
_QUERY = re.compile(r"([?#]).*")
_VALUE = re.compile(r"=[^/&;,]*")


def safe_cell(text: str) -> str:
    """A text cell of a CSV file; what a spreadsheet would run as a formula gets an apostrophe in front.

    For text alone: a number such as -1.5 is no formula.
    """
    # Escapes for bytes that are not UTF-8, and for carriage returns, which Python's writer does not quote.
    text = text.encode("utf-8", "backslashreplace").decode().replace("\r", "\\r")
    return "'" + text if text.lstrip(" \ufeff").startswith(_FORMULA) else text


def redact(text: str) -> str:
    """`text` with *** for the user, password, query and values (`name=value`) of each address in it.

    It hides too much rather than too little.
    """
    return _ADDRESS.sub(lambda match: _VALUE.sub("=***", _QUERY.sub(r"\1***", match[0])), _USER.sub("://***@", text))
