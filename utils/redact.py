"""Camera addresses may hold passwords: what is printed or written goes through `redact` first."""

import re

_USER = re.compile(r"://.*@", re.DOTALL)  # to the last @: passwords may hold spaces, slashes, and @ itself
_ADDRESS = re.compile(r"\w://\S*")
_QUERY = re.compile(r"([?#]).*")
_VALUE = re.compile(r"=[^/&;,]*")


def redact(text: str) -> str:
    """`text` with *** for the user, password, query and values (`name=value`) of each address in it.

    Errs on the side of hiding: from the first :// on, everything up to the last @ counts as user and password.
    """
    return _ADDRESS.sub(_hide, _USER.sub("://***@", text))


def _hide(match: re.Match[str]) -> str:
    return _VALUE.sub("=***", _QUERY.sub(r"\1***", match[0]))
