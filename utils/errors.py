"""The exceptions that mean "the user can fix this"."""

from collections.abc import Iterable, Sequence


class InputError(Exception):
    """The message says in one line what is wrong, and the remedy; the `details` are lines to be printed before it."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = details


class UnreadableError(InputError):
    """A data file exists but cannot be read as what it should be."""


def require_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError that names the first of the `names` that is not one of the `known`."""
    for name in names:
        if name not in known:
            raise InputError(f"{what} '{name}' is not one of {', '.join(known)}")
